"""Round trips and refusals of the nix room, for anything that hypothesis thinks of."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from narseal.errors import Malformed, NarsealError, Refused
from narseal.nix import base32, nar
from narseal.nix.compression import decompressor, zstd_compressor
from narseal.nix.content_address import ContentAddress, Method
from narseal.nix.fingerprint import fingerprint
from narseal.nix.hashes import SIZES, Hash
from narseal.nix.keys import Signature
from narseal.nix.nar_reader import NarReader, NarSummary
from narseal.nix.narinfo import NarInfo
from narseal.nix.references import HashModulo, ReferenceScanner
from narseal.nix.store_path import References, StorePath
from narseal.server.conditional import Span, Unsatisfiable, parse_range
from tests.tools.cache import COMPRESS
from tests.tools.nar_reader import EVERYTHING, ReferenceNarReader

hash_parts = st.text(base32.ALPHABET, min_size=32, max_size=32)
names = st.from_regex(r"[a-zA-Z0-9+_?=][0-9a-zA-Z+\-._?=]{0,60}", fullmatch=True)
store_paths = st.builds(StorePath, hash_parts, names)
sha256 = st.binary(min_size=32, max_size=32).map(lambda digest: Hash("sha256", digest))
key_names = st.text("abcdefgh.-0123456789", min_size=1, max_size=30)
signatures = st.builds(Signature, key_names, st.binary(min_size=64, max_size=64))
any_hash = st.sampled_from(sorted(SIZES)).flatmap(
    lambda a: st.binary(min_size=SIZES[a], max_size=SIZES[a]).map(lambda d: Hash(a, d))
)
addresses = st.builds(
    ContentAddress, st.sampled_from([Method.FLAT, Method.NAR, Method.GIT]), any_hash
)
extra = st.dictionaries(
    st.from_regex(r"X-[A-Za-z]{1,10}", fullmatch=True),
    st.from_regex(r"[!-~]([ -~]{0,20}[!-~])?", fullmatch=True), max_size=3,
)  # fmt: skip
#: A hash part is of one path.
references = st.lists(store_paths, max_size=5, unique_by=lambda path: path.hash_part).map(
    lambda paths: tuple(sorted(paths))
)


def _narinfo(store_path: StorePath, references: tuple[StorePath, ...], **fields: Any) -> NarInfo:
    """One whose references may hold the path itself, but no other of its hash part."""
    kept = [ref for ref in references if ref.hash_part != store_path.hash_part]
    return NarInfo(store_path=store_path, references=References(kept), **fields)


narinfos = st.builds(
    _narinfo,
    store_dir=st.just("/nix/store"),
    store_path=store_paths,
    url=st.from_regex(r"nar/[0-9a-z]{1,52}\.nar", fullmatch=True),
    compression=st.sampled_from(["none", "xz", "zstd", "bzip2", "br"]),
    nar_hash=sha256,
    nar_size=st.integers(1, (1 << 63) - 1),
    file_hash=st.none() | sha256,
    file_size=st.none() | st.integers(0, 1 << 62),
    references=references,
    deriver=st.none() | store_paths,
    signatures=st.sets(signatures, max_size=4).map(lambda found: tuple(sorted(found))),
    ca=st.none() | addresses,
    extra=extra.map(lambda fields: tuple(fields.items())),
)
nodes = st.recursive(
    st.builds(nar.Regular, st.binary(max_size=40), st.booleans())
    | st.builds(nar.Symlink, st.binary(min_size=1, max_size=20).filter(lambda t: 0 not in t)),
    lambda inner: st.builds(
        nar.Directory,
        st.dictionaries(
            st.binary(min_size=1, max_size=12).filter(
                lambda n: not set(n) & {0, 47} and n not in (b".", b"..")
            ),
            inner, max_size=4,
        ),
    ),
    max_leaves=12,
)  # fmt: skip


def portions(data: bytes, sizes: list[int]) -> list[bytes]:
    result, at = [], 0
    for size in sizes:
        result.append(data[at : at + size])
        at += size
    return [*result, data[at:]]


@given(st.binary(max_size=80))
def test_nix32_round_trip(data: bytes) -> None:
    assert base32.decode(base32.encode(data), len(data)) == data


@given(st.text(base32.ALPHABET, min_size=52, max_size=52))
def test_nix32_has_one_spelling(text: str) -> None:
    try:
        assert base32.encode(base32.decode(text, 32)) == text
    except Malformed:
        assert base32.ALPHABET.index(text[0]) > 1  # bits that 32 bytes do not have


@given(any_hash)
def test_hash_round_trips(value: Hash) -> None:
    spelled = (str(value), value.sri, f"{value.algorithm}:{value.hex}")
    assert {Hash.parse(text) for text in spelled} == {value}


@given(addresses)
def test_content_address_round_trip(value: ContentAddress) -> None:
    assert ContentAddress.parse(str(value)) == value


@given(narinfos)
def test_narinfo_round_trip(info: NarInfo) -> None:
    assert NarInfo.parse(info.render()) == info


@given(narinfos, st.data())
def test_a_damaged_narinfo_is_refused_or_means_what_it_says(
    info: NarInfo, data: st.DataObject
) -> None:
    text = bytearray(info.render())
    at = data.draw(st.integers(0, len(text) - 1))
    text[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        parsed = NarInfo.parse(bytes(text))
    except Malformed:
        return
    assert NarInfo.parse(parsed.render()) == parsed


@given(st.binary(max_size=300))
def test_any_bytes_are_a_narinfo_or_malformed(data: bytes) -> None:
    try:
        NarInfo.parse(data)
    except NarsealError:
        return


@given(narinfos, st.permutations(range(5)))
def test_references_in_any_order_give_one_fingerprint(info: NarInfo, order: list[int]) -> None:
    references = list(info.references)
    shuffled = [references[i] for i in order if i < len(references)] + references
    again = fingerprint("/nix/store", info.store_path, info.nar_hash, info.nar_size, shuffled)
    assert again == info.fingerprint()


@given(narinfos, store_paths)
def test_each_edit_of_what_is_signed_changes_the_fingerprint(
    info: NarInfo, other: StorePath
) -> None:
    parts = {path.hash_part for path in (info.store_path, *info.references)}
    assume(other.hash_part not in parts)
    edits = [
        replace(info, store_path=other),
        replace(info, nar_hash=Hash.sha256(info.nar_hash.digest)),
        replace(info, nar_size=info.nar_size - 1 or 2),
        replace(info, references=References({*info.references, other})),
        replace(info, references=References(info.references[1:])),
    ]
    for edit in edits:
        assert (edit.fingerprint() == info.fingerprint()) == (
            (edit.store_path, edit.nar_hash, edit.nar_size, edit.references)
            == (info.store_path, info.nar_hash, info.nar_size, info.references)
        )


@given(nodes, st.lists(st.integers(0, 60), max_size=20))
def test_nar_is_read_in_any_portions(node: nar.Node, sizes: list[int]) -> None:
    data = b"".join(nar.render(node))
    contents: list[bytes] = []
    reader = NarReader(max_size=len(data), on_contents=lambda p: contents.append(bytes(p)))
    for portion in portions(data, sizes):
        reader.feed(portion)
    summary = reader.finish()
    assert (summary.nar_hash, summary.nar_size) == (Hash.sha256(data), len(data))
    assert summary.is_plain_file == (isinstance(node, nar.Regular) and not node.executable)
    assert b"".join(contents) == b"".join(_contents(node))


def _contents(node: nar.Node) -> list[bytes]:
    if isinstance(node, nar.Directory):
        return [c for _, child in sorted(node.entries.items()) for c in _contents(child)]
    return [node.contents] if isinstance(node, nar.Regular) else []


@given(nodes, st.data())
def test_a_cut_or_lengthened_nar_is_refused(node: nar.Node, data: st.DataObject) -> None:
    whole = b"".join(nar.render(node))
    cut = data.draw(st.integers(0, len(whole) - 1))
    for wrong in (whole[:cut], whole + b"\0", whole + nar.string(b")"), whole + whole):
        reader = NarReader(max_size=2 * len(whole))
        with pytest.raises(NarsealError):
            reader.feed(wrong)
            reader.finish()


def read(
    make: type[NarReader | ReferenceNarReader], data: list[bytes], *, files: bool
) -> tuple[NarSummary, bytes, list[bytes]] | None:
    """What a reader makes of some portions: summary, contents, files; None if it refuses them."""
    contents: list[bytes] = []
    found: list[bytes] = []
    reader = make(
        max_size=1 << 20,
        on_contents=lambda p: contents.append(bytes(p)),
        on_file=found.append if files else None,
    )
    try:
        for portion in data:
            reader.feed(portion)
        return reader.finish(), b"".join(contents), found
    except NarsealError:
        return None


@given(nodes, st.lists(st.integers(0, 300), max_size=20), st.booleans())
def test_nar_is_read_as_token_by_token(node: nar.Node, sizes: list[int], files: bool) -> None:
    data = b"".join(nar.render(node))
    expected = read(ReferenceNarReader, [data], files=files)
    assert expected is not None
    assert read(NarReader, portions(data, sizes), files=files) == expected
    assert read(NarReader, [data], files=files) == expected


def test_a_nar_is_read_wherever_it_is_cut() -> None:
    data = b"".join(nar.render(EVERYTHING))
    expected = read(ReferenceNarReader, [data], files=True)
    assert expected is not None
    for at in range(len(data) + 1):
        assert read(NarReader, [data[:at], data[at:]], files=True) == expected
    for size in range(1, 300):
        assert read(NarReader, list(batched(data, size)), files=True) == expected


def test_each_word_of_a_nar_changed_is_judged_as_token_by_token() -> None:
    whole = b"".join(nar.render(EVERYTHING))
    for at in range(0, len(whole), 8):
        word = whole[at : at + 8]
        number = int.from_bytes(word, "little")
        near = [(number + more) % (1 << 64) for more in (1, -1, 8, -8)]
        for other in {
            b"", word * 2, bytes(8), b"\xff" * 8, b"\1" + bytes(7), b"(" + bytes(7), b")" + bytes(7),
            word[:7] + bytes([word[7] ^ 1]), bytes([word[0] ^ 1]) + word[1:], word[::-1],
*(n.to_bytes(8, "little") for n in near),
        }:  # fmt: skip
            data = whole[:at] + other + whole[at + 8 :]
            expected = read(ReferenceNarReader, [data], files=True)
            for given_ in ([data], list(batched(data, 97))):
                assert read(NarReader, given_, files=True) == expected, (at, other)


def batched(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


ENDLESS = {
    "name": nar.strings(b"entry", b"(", b"name") + (1 << 40).to_bytes(8, "little"),
    "name that may be": nar.strings(b"entry", b"(", b"name") + (255).to_bytes(8, "little"),
    "target": nar.strings(b"entry", b"(", b"name", b"x", b"node", b"(", b"type", b"symlink", b"target")
    + (1 << 40).to_bytes(8, "little"),
    "token": (1 << 40).to_bytes(8, "little"),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDLESS)
def test_what_never_ends_is_refused_before_it_fills_memory(case: str) -> None:
    reader = NarReader(max_size=1 << 62)
    with pytest.raises(Malformed):
        reader.feed(nar.strings(nar.MAGIC, b"(", b"type", b"directory") + ENDLESS[case])
        for _ in range(200):
            reader.feed(b"x" * 100)


def test_a_large_file_and_many_small_ones_take_no_memory() -> None:
    small = b"".join(nar.render(nar.Directory({b"%06d" % n: KINDS[n % 3] for n in range(20_000)})))
    size = 64 << 20
    start = nar.strings(nar.MAGIC, b"(", b"type", b"regular", b"contents")
    piece = bytes(1 << 16)
    portions_of = {
        "large": [start + size.to_bytes(8, "little"), *[piece] * (size >> 16), nar.string(b")")],
        "small": list(batched(small, 1 << 16)),
    }
    for case, given_ in portions_of.items():
        reader = NarReader(max_size=1 << 30)
        tracemalloc.start()
        for portion in given_:
            reader.feed(portion)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        reader.finish()
        assert peak < 1 << 20, case


KINDS: list[nar.Node] = [
    nar.Regular(b"x"),
    nar.Regular(b"", executable=True),
    nar.Symlink(b"a"),
    nar.Directory({}),
]


@given(st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.sampled_from(KINDS)), max_size=4))
def test_names_of_every_kind_are_sorted_and_there_once(
    entries: list[tuple[bytes, nar.Node]],
) -> None:
    data = nar.strings(nar.MAGIC, b"(", b"type", b"directory")
    for name, node in entries:
        body = b"".join(nar.render(node)).removeprefix(nar.string(nar.MAGIC))
        data += nar.strings(b"entry", b"(", b"name", name, b"node") + body + nar.string(b")")
    data += nar.string(b")")
    names = [name for name, _ in entries]
    is_good = names == sorted(set(names))
    for files in (True, False):
        assert (read(NarReader, [data], files=files) is not None) == is_good


TOKENS = b"( ) type regular contents executable symlink target directory entry name node".split()


@settings(max_examples=600)
@given(nodes, st.lists(st.integers(0, 300), max_size=8), st.data())
def test_a_damaged_nar_is_judged_as_token_by_token(
    node: nar.Node, sizes: list[int], data: st.DataObject
) -> None:
    text = bytearray(b"".join(nar.render(node)))
    for _ in range(data.draw(st.integers(1, 3))):
        text = text or bytearray(1)
        at = data.draw(st.integers(0, len(text) - 1))
        kind = data.draw(st.sampled_from(["bit", "byte", "word", "cut", "twice", "put", "swap"]))
        if kind == "bit":
            text[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "byte":
            text[at : at + 1] = data.draw(st.binary(max_size=2))
        elif kind == "word":  # where lengths and tokens stand
            at &= ~7
            text[at : at + 8] = data.draw(st.integers(0, 300)).to_bytes(8, "little")
        elif kind == "put":
            at &= ~7
            text[at:at] = nar.string(data.draw(st.sampled_from(TOKENS) | st.binary(max_size=9)))
        elif kind == "swap":
            at &= ~7
            length = 8 * data.draw(st.integers(1, 40))
            text[at : at + 2 * length] = (
                text[at + length : at + 2 * length] + text[at : at + length]
            )
        else:
            length = 8 * data.draw(st.integers(1, 40))
            at &= ~7
            text[at : at + length] = b"" if kind == "cut" else text[at : at + length] * 2
    whole = bytes(text)
    expected = read(ReferenceNarReader, [whole], files=True)
    for files in (True, False):
        for given_ in ([whole], portions(whole, sizes)):
            found = read(NarReader, given_, files=files)
            assert (found and found[:2]) == (expected and expected[:2])


NO_NAMES = {
    "dot dot": b"..", "dot": b".", "slash": b"a/b", "NUL": b"a\0", "empty": b"", "long": b"x" * 256,
    "case hack": b"a~nix~case~hack~1",
}  # fmt: skip
HOSTILE: dict[str, nar.Node] = {
    "empty target": nar.Symlink(b""),
    "NUL in a target": nar.Symlink(b"a\0b"),
    "long target": nar.Symlink(b"x" * 4096),
}
for case, name in NO_NAMES.items():
    HOSTILE[f"{case} name of a plain file"] = nar.Directory({name: KINDS[0], b"~": KINDS[2]})
    for node in KINDS[1:]:
        HOSTILE[f"{case} name of a {type(node).__name__}"] = nar.Directory({name: node})


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_nars_are_refused(case: str) -> None:
    reader = NarReader(max_size=1 << 20)
    with pytest.raises(Malformed):
        reader.feed(b"".join(nar.render(HOSTILE[case])))
        reader.finish()


@pytest.mark.parametrize("mark", [b"", nar.strings(b"executable", b"")])
def test_a_file_without_contents_is_refused_as_nix_refuses_it(mark: bytes) -> None:
    bare = nar.strings(b"(", b"type", b"regular") + mark + nar.string(b")")
    inside = nar.strings(b"(", b"type", b"directory", b"entry", b"(", b"name", b"a", b"node")
    for data in (bare, inside + bare + nar.strings(b")", b")")):
        assert read(NarReader, [nar.string(nar.MAGIC) + data], files=True) is None


def test_a_nar_deeper_than_nix_reads_is_refused() -> None:
    for depth, good in ((64, True), (65, False)):
        node: nar.Node = nar.Directory({})
        for _ in range(depth - 1):
            node = nar.Directory({b"d": node})
        reader = NarReader(max_size=1 << 20)
        if good:
            reader.feed(b"".join(nar.render(node)))
            reader.finish()
        else:
            with pytest.raises(Malformed):
                reader.feed(b"".join(nar.render(node)))
                reader.finish()


def test_unsorted_names_and_padding_are_refused() -> None:
    data = b"".join(nar.render(nar.Directory({b"a": nar.Regular(b"x"), b"b": nar.Regular(b"x")})))
    swapped = data.replace(b"a\0\0\0\0\0\0\0", b"c\0\0\0\0\0\0\0", 1)
    padded = data.replace(b"x\0\0\0\0\0\0\0", b"x\0\0\0\0\0\0\1", 1)
    twice = data.replace(b"b\0\0\0\0\0\0\0", b"a\0\0\0\0\0\0\0", 1)
    for wrong in (swapped, padded, twice):
        reader = NarReader(max_size=1 << 20)
        with pytest.raises(Malformed):
            reader.feed(wrong)
            reader.finish()


@given(
    st.sampled_from(sorted(COMPRESS)), st.binary(max_size=2000), st.lists(st.integers(0, 50)),
)  # fmt: skip
def test_decompression_in_any_portions(compression: str, data: bytes, sizes: list[int]) -> None:
    decoder = decompressor(compression)
    plain = b"".join(
        piece
        for part in portions(COMPRESS[compression](data), sizes)
        for piece in decoder.feed(part)
    )
    decoder.finish()
    assert plain == data


@given(st.sampled_from(["xz", "zstd", "bzip2", "gzip"]), st.binary(max_size=50))
def test_concatenated_frames_are_all_read(compression: str, data: bytes) -> None:
    decoder = decompressor(compression)
    file = COMPRESS[compression](data) * 3
    assert b"".join(decoder.feed(file)) == data * 3
    decoder.finish()


@given(st.sampled_from(["xz", "zstd", "bzip2", "gzip", "br", "lzma"]), st.data())
def test_truncated_streams_are_refused(compression: str, data: st.DataObject) -> None:
    file = COMPRESS[compression](b"some text " * 20)
    cut = data.draw(st.integers(0, len(file) - 1))
    decoder = decompressor(compression)
    with pytest.raises(Refused):
        for _ in decoder.feed(file[:cut]):
            pass
        decoder.finish()


def decoded(file: bytes, *, compression: str = "zstd", small: bool = False) -> bytes:
    decoder = decompressor(compression, small=small)
    plain = b"".join(decoder.feed(file))
    decoder.finish()
    return plain


@given(
    st.sampled_from(["xz", "zstd", "bzip2", "gzip", "br"]), st.binary(min_size=1, max_size=20),
)  # fmt: skip
def test_bytes_behind_a_stream_are_refused(compression: str, more: bytes) -> None:
    file = COMPRESS[compression](b"some text")
    assume(not more.startswith(file))
    with pytest.raises(Refused):
        decoded(file + more, compression=compression)


@given(st.integers(0, 15), st.binary(max_size=40), st.binary(max_size=40))
def test_skippable_frames_of_zstd_hold_nothing(kind: int, skipped: bytes, data: bytes) -> None:
    head = (0x184D2A50 + kind).to_bytes(4, "little") + len(skipped).to_bytes(4, "little")
    file = COMPRESS["zstd"](data)
    assert decoded(head + skipped + file + head + skipped + file) == data * 2
    with pytest.raises(Refused):
        decoded(file + (head + skipped)[:-1])


@given(st.binary(max_size=100), st.integers(0, 31))
def test_a_checksum_of_zstd_is_compared(data: bytes, bit: int) -> None:
    compressor = zstd_compressor(3)
    file = bytearray(compressor.compress(data) + compressor.flush())
    assert decoded(bytes(file)) == data
    file[-1 - bit // 8] ^= 1 << bit % 8
    with pytest.raises(Refused):
        decoded(bytes(file))


def test_windows_of_zstd_are_bounded_more_so_in_an_encoding() -> None:
    head = b"\x28\xb5\x2f\xfd\x00"  # no checksum, no size: a byte that says the window follows
    empty = b"\x01\x00\x00"  # the last block, raw, of no bytes
    for log, of_nars, of_others in (
        (23, True, True),
        (24, True, False),
        (27, True, False),
        (28, False, False),
    ):
        file = head + bytes([(log - 10) << 3]) + empty
        for small, good in ((False, of_nars), (True, of_others)):
            if good:
                assert decoded(file, small=small) == b""
            else:
                with pytest.raises(Refused):
                    decoded(file, small=small)


BOMBS = ("xz", "bzip2", "gzip", "zstd", "br")


@pytest.mark.parametrize("compression", BOMBS)
def test_a_bomb_comes_out_in_bounded_pieces(compression: str) -> None:
    file = COMPRESS[compression](bytes(32 << 20))
    taken = 0
    for piece in decompressor(compression).feed(file):
        assert len(piece) <= 1 << 20
        taken += len(piece)
        if taken > 1 << 20:
            break


@given(st.binary(max_size=300), st.lists(st.integers(0, 60), max_size=8))
def test_hash_modulo_does_not_depend_on_portions(data: bytes, sizes: list[int]) -> None:
    part = "0123456789abcdfghijklmnpqrsvwxyz"
    text = data[:100] + part.encode() + data[100:] + part.encode() * 2
    whole, parted = HashModulo("sha256", part), HashModulo("sha256", part)
    whole.update(text)
    for portion in portions(text, sizes):
        parted.update(portion)
    assert whole.digests() == parted.digests()


@given(hash_parts, st.binary(max_size=100), st.lists(st.integers(0, 60), max_size=8))
def test_references_are_found_in_any_portions(part: str, data: bytes, sizes: list[int]) -> None:
    scanner = ReferenceScanner([part])
    for portion in portions(data + part.encode() + data, sizes):
        scanner.feed(portion)
    assert scanner.found == {part}


@given(st.integers(1, 10_000), st.integers(0, 10_000), st.integers(0, 10_000))
def test_ranges(size: int, start: int, stop: int) -> None:
    try:
        span = parse_range(f"bytes={start}-{stop}", size)
    except Unsatisfiable:
        assert start >= size
        return
    assert span == (None if stop < start else Span(start, min(stop + 1, size)))
    open_end = parse_range(f"bytes={start}-", size) if start < size else None
    assert open_end is None or open_end == Span(start, size)
    if stop:
        assert parse_range(f"bytes=-{stop}", size) == Span(max(0, size - stop), size)


@given(st.text(max_size=40), st.integers(1, 100))
def test_any_range_header_is_a_span_or_the_whole_or_416(header: str, size: int) -> None:
    try:
        span = parse_range(header, size)
    except Unsatisfiable:
        return
    assert span is None or 0 <= span.start < span.stop <= size
