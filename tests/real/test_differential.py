"""narseal's parsers against Nix's own: never accept what Nix reads differently (U4, U7)."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from narseal.errors import NarsealError
from narseal.nix import nar
from narseal.nix.hashes import Hash
from narseal.nix.nar_reader import NarReader
from narseal.nix.narinfo import NarInfo
from tests.tools.differential import ITEM, read_by_nix
from tests.tools.nar_reader import EVERYTHING
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


def damaged(choice: random.Random, good: bytes) -> bytes:
    """A NAR with a few changes to bytes, or to the words that lengths and tokens are made of."""
    data = bytearray(good)
    for _ in range(choice.choice((1, 1, 1, 2))):
        at = choice.randrange(len(data))
        word = at & ~7
        size = 8 * choice.choice((1, 2, 3, 4, 8, 16))
        kind = choice.randrange(5)
        if kind < 2:
            data[at] = choice.choice([0, 1, 2, 47, 46, 97, 98, 255, data[at] ^ 1])
        elif kind == 2:
            del data[word : word + size]
        elif kind == 3:
            data[word:word] = data[word : word + size]
        else:
            data[word : word + 2 * size] = (
                data[word + size : word + 2 * size] + data[word : word + size]
            )
    return bytes(data)


def is_nar(data: bytes) -> bool:
    reader = NarReader(max_size=len(data))
    try:
        reader.feed(data)
        reader.finish()
    except NarsealError:
        return False
    return True


def test_every_nar_that_narseal_accepts_nix_restores(client: Nix) -> None:
    good = b"".join(nar.render(EVERYTHING))
    choice = random.Random(7)
    candidates = [good, *(damaged(choice, good) for _ in range(15_000))]
    accepted = list(dict.fromkeys(filter(is_nar, candidates)))
    assert len(accepted) > 80
    assert restored(client, accepted) == accepted


def test_nars_of_many_entries_are_read_as_nix_writes_them(client: Nix) -> None:
    choice = random.Random(8)
    trees = [forest(choice, 3) for _ in range(10)]
    nars = [b"".join(nar.render(tree)) for tree in trees]
    assert max(map(len, nars)) > 1 << 17
    assert restored(client, nars) == nars
    for data in nars:
        files: list[bytes] = []
        reader = NarReader(max_size=len(data), on_file=files.append)
        for at in range(0, len(data), 4096):
            reader.feed(data[at : at + 4096])
        assert reader.finish().nar_hash == Hash.sha256(data)


def forest(choice: random.Random, depth: int) -> nar.Directory:
    """A tree of some hundred entries of every kind, with names and contents of every size."""
    entries: dict[bytes, nar.Node] = {}
    for _ in range(choice.choice((0, 1, 5, 40))):
        name = bytes(choice.choices(b"abyz.+-_ \x04\x7f", k=choice.randint(1, 40))).lstrip(b".")
        contents = choice.randbytes(choice.choice((0, 1, 7, 8, 9, 100, 4000)))
        kind = choice.choice(["file", "executable", "link", "folder"][: 4 if depth else 3])
        if kind == "folder":
            entries[name or b"x"] = forest(choice, depth - 1)
        elif kind == "link":
            entries[name or b"x"] = nar.Symlink(
                bytes(choice.choices(b"ab./", k=len(contents) or 1))
            )
        else:
            entries[name or b"x"] = nar.Regular(contents, executable=kind == "executable")
    return nar.Directory(entries)


def restored(client: Nix, nars: list[bytes]) -> list[bytes | None]:
    """What real Nix makes of NARs when it restores and dumps them; None for what it refuses."""
    for number, data in enumerate(nars):
        (client.folder / f"{number}.nar").write_bytes(data)
    client.script(
        f"for n in $(seq 0 {len(nars) - 1}); do rm -rf tree; rm -f $n.again;"
        " nix-store --restore tree < $n.nar 2>/dev/null && nix-store --dump tree > $n.again; done; :"
    )
    files = [client.folder / f"{number}.again" for number in range(len(nars))]
    return [file.read_bytes() if file.exists() else None for file in files]
