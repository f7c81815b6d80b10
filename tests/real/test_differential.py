"""narseal's parsers against Nix's own: never accept what Nix reads differently (U4, U7)."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from narseal.errors import NarsealError
from narseal.nix import nar
from narseal.nix.nar_reader import NarReader
from narseal.nix.narinfo import NarInfo
from tests.tools.differential import ITEM, read_by_nix
from tests.tools.nix import Nix, nix

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def client() -> Iterator[Nix]:
    with nix() as fresh:
        yield fresh


def variants() -> list[bytes]:
    """Texts near a good narinfo, always the same ones."""
    text = ITEM.info.render()
    lines = text.splitlines(keepends=True)
    choice = random.Random(2034)
    found = [
        text + b"CA: x\n", text.replace(b"NarSize: ", b"NarSize:  "), text + b"# a: b\n",
        text.replace(b"NarSize: ", b"NarSize: 0"), text.replace(b"NarSize: ", b"NarSize: +"),
        text.replace(b"\n", b"\r\n"), text + b"\n", text[:-1], text.replace(b": ", b":"),
        text.replace(b"References: ", b"References:"), text.replace(b"-dep", b"-dep  "),
        text.replace(b"Compression: xz\n", b""), text.replace(b"Compression: xz", b"Compression: "),
        text + b"Sig: a\n", text + b"Sig: a:b\n", text.replace(b"sha256:", b"SHA256:"),
        text + b"References: \n", text + b"NarSize: 1\n", text + b"StorePath: /nix/store/x\n",
        text + b"Deriver: unknown-deriver\n", text + b"Deriver: \n", b"".join(reversed(lines)),
        text + b"X-More: 1\n", text.replace(b"URL: nar/", b"URL: ./nar/"),
    ]  # fmt: skip
    alphabet = b"\n :,-=/azAZ09%\x00\x7f\xc3+."
    for _ in range(130):
        data = bytearray(text)
        for _ in range(choice.randint(1, 2)):
            at = choice.randrange(len(data))
            new = bytes(choice.choices(alphabet, k=choice.randint(0, 2)))
            data[at : at + choice.randint(0, 2)] = new
        found.append(bytes(data))
    return found


def test_what_narseal_accepts_nix_reads_the_same(client: Nix) -> None:
    texts = variants()
    parsed: list[NarInfo | None] = []
    for text in texts:
        try:
            parsed.append(NarInfo.parse(text))
        except NarsealError:
            parsed.append(None)
    accepted = [n for n, info in enumerate(parsed) if info]
    assert 10 < len(accepted) < len(texts)
    by_nix = read_by_nix(client, texts)
    ours = read_by_nix(client, [p.render() if p else b"" for p in parsed])
    both = 0
    for number in accepted:
        info = parsed[number]
        assert info
        assert ours[number] or info.store_path != ITEM.info.store_path, texts[number]
        if by_nix[number] and info.store_path == ITEM.info.store_path:
            theirs, mine = dict(by_nix[number] or {}), dict(ours[number] or {})
            # a malformed Sig is dropped here; Nix keeps what it cannot read
            theirs_sigs, my_sigs = theirs.pop("signatures"), mine.pop("signatures")
            assert mine == theirs, texts[number]
            assert set(my_sigs) <= set(theirs_sigs)  # type: ignore[call-overload]
            both += 1
    assert both > 8


def test_every_nar_that_narseal_accepts_nix_restores(client: Nix) -> None:
    tree = nar.Directory(
        {
            b"a": nar.Regular(b"hello"),
            b"b": nar.Directory({b"c": nar.Symlink(b"../a"), b"d": nar.Regular(b"x", True)}),
        }
    )
    good = b"".join(nar.render(tree))
    choice = random.Random(7)
    candidates = [good]
    for _ in range(4000):
        changed = bytearray(good)
        at = choice.randrange(len(changed))
        changed[at] = choice.choice([0, 1, 2, 47, 46, 97, 98, 255, changed[at] ^ 1])
        candidates.append(bytes(changed))
    accepted = []
    for data in candidates:
        reader = NarReader(max_size=len(data))
        try:
            reader.feed(data)
            reader.finish()
        except NarsealError:
            continue
        if data not in accepted:
            accepted.append(data)
    assert len(accepted) > 20
    for number, data in enumerate(accepted[:120]):
        (client.folder / f"{number}.nar").write_bytes(data)
    count = min(120, len(accepted))
    failed = client.script(
        f"for n in $(seq 0 {count - 1}); do nix-store --restore r$n < $n.nar 2>/dev/null"
        " || echo $n; done"
    )
    assert failed == "", [accepted[int(n)] for n in failed.split()]
