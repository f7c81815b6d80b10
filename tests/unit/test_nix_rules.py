"""Rules of the nix room at their edges: what is one byte, one name or one line beside the right."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest

from narseal.errors import (
    ContentMismatch,
    Malformed,
    MalformedNar,
    MalformedNarInfo,
    MalformedStorePath,
    NarsealError,
    Refused,
)
from narseal.nix import nar
from narseal.nix.addressing import check_content_address, check_url, names_nar_hash
from narseal.nix.bounded_json import check_shape, load_json
from narseal.nix.content_address import ContentAddress, Method
from narseal.nix.fingerprint import fingerprint
from narseal.nix.hashes import Hash
from narseal.nix.inspection import Inspection
from narseal.nix.keyring import MAX_FAILURES, KeyRing
from narseal.nix.keys import Signature
from narseal.nix.narinfo import MAX_SIGNATURES, MAX_SIZE, NarInfo
from narseal.nix.realisation import BuildTraceEntry, Realisation, parse_at
from narseal.nix.references import HashModulo
from narseal.nix.store_path import References, StorePath, check_store_dir
from tests.tools.cache import Entry, entry, key, store_path

STORE = "/nix/store"
ITEM = entry("app", b"1", compression="none")
A, B = store_path("a"), store_path("b")
FIRST, LAST = sorted((A, B), key=str)
KEY, OTHER = key("a-1"), key("b-1")


def path_of(
    ca: ContentAddress, *references: StorePath, self_hash: str = "", name: str = "x"
) -> StorePath | None:
    return ca.store_path(name, references, self_hash=self_hash, store_dir=STORE)


# paths of real Nix 2.34.8 are in tests/vectors; these are the manual's words ("Store Path
# Specification"), computed by hand
def test_references_of_an_address_are_sorted_and_each_counts_once() -> None:
    for ca in (ContentAddress(Method.TEXT, Hash.sha256(b"x")),
               ContentAddress(Method.NAR, Hash.sha256(b"x"))):  # fmt: skip
        both = path_of(ca, FIRST, LAST)
        assert both == path_of(ca, LAST, FIRST) == path_of(ca, LAST, FIRST, LAST)
        assert len({both, path_of(ca), path_of(ca, FIRST), path_of(ca, LAST)}) == 4


def test_the_store_path_of_an_address_as_the_specification_has_it() -> None:
    import hashlib

    from tests.tools import checker

    digest = hashlib.sha256(b"x").digest()
    text = ContentAddress(Method.TEXT, Hash("sha256", digest))
    source = ContentAddress(Method.NAR, Hash("sha256", digest))
    for ca, word in ((text, "text"), (source, "source")):
        kind = f"{word}:{FIRST.full(STORE)}:{LAST.full(STORE)}"
        wanted = checker.made(kind, digest, STORE, "x")
        assert str(path_of(ca, LAST, FIRST)) == wanted
    own = store_path("own")
    kind = f"source:{FIRST.full(STORE)}:self"
    assert str(path_of(source, own, FIRST, self_hash=own.hash_part)) == checker.made(
        kind, digest, STORE, "x"
    )


def test_which_addresses_have_no_path() -> None:
    own = store_path("own")
    digest = Hash.sha256(b"x")
    sha1 = Hash("sha1", bytes(20))
    assert path_of(ContentAddress(Method.TEXT, digest), own, self_hash=own.hash_part) is None
    for ca in (
        ContentAddress(Method.FLAT, digest),
        ContentAddress(Method.FLAT, sha1),
        ContentAddress(Method.NAR, sha1),
        ContentAddress(Method.GIT, sha1),
        ContentAddress(Method.GIT, digest),
    ):
        assert path_of(ca) is not None
        assert path_of(ca, A) is None
        assert path_of(ca, own, self_hash=own.hash_part) is None


def test_each_address_has_a_path_of_its_own() -> None:
    digest = Hash.sha256(b"x")
    cas = [ContentAddress(method, digest) for method in Method]
    cas += [ContentAddress(m, Hash("sha1", bytes(20))) for m in Method if m is not Method.TEXT]
    assert len({path_of(ca) for ca in cas}) == len(cas)
    assert path_of(cas[0]) != path_of(cas[0], name="y")
    assert path_of(cas[0]) != cas[0].store_path("x", (), self_hash="", store_dir="/gnu/store")


def addressed(method: Method, hashed: Hash, node: nar.Node, **more: object) -> Entry:
    ca = ContentAddress(method, hashed)
    path = path_of(ca, name="app")
    assert path
    return entry("app", node=node, ca=ca, path=path, compression="none").but(**more)


def measure(item: Entry, *, scan: bool = False) -> frozenset[str]:
    inspection = Inspection(item.info, scan=scan)
    inspection.feed(item.file)
    return inspection.finish().missing


PLAIN, EXECUTABLE = nar.Regular(b"contents"), nar.Regular(b"contents", executable=True)


@pytest.mark.parametrize("method", [Method.FLAT, Method.TEXT])
def test_an_address_of_contents_is_of_one_plain_file(method: Method) -> None:
    hashed = Hash.sha256(b"contents")
    measure(addressed(method, hashed, PLAIN))
    for node in (
        EXECUTABLE,
        nar.Directory({b"a": PLAIN}),
        nar.Regular(b"contents2"),
        nar.Symlink(b"contents"),
    ):
        with pytest.raises(ContentMismatch):
            measure(addressed(method, hashed, node))


@pytest.mark.parametrize("algorithm", ["sha1", "sha512", "md5"])
def test_an_address_of_a_nar_by_another_hash(algorithm: str) -> None:
    import hashlib

    data = b"".join(nar.render(PLAIN))
    right = Hash(algorithm, hashlib.new(algorithm, data).digest())
    measure(addressed(Method.NAR, right, PLAIN))
    with pytest.raises(ContentMismatch):
        measure(addressed(Method.NAR, Hash(algorithm, bytes(len(right.digest))), PLAIN))


def test_an_address_denies_another_path_and_another_nar_hash() -> None:
    good = addressed(Method.NAR, Hash.sha256(b"".join(nar.render(PLAIN))), PLAIN).info
    check_content_address(good)
    assert names_nar_hash(good)
    for wrong in (
        replace(good, store_path=replace(good.store_path, name="app2")),
        replace(good, store_path=StorePath(A.hash_part, "app")),
        replace(good, references=References((A,))),
        replace(good, nar_hash=Hash.sha256(b"x")),
        replace(good, store_dir="/gnu/store"),
    ):
        with pytest.raises(Refused, match="CA"):
            check_content_address(wrong)
    assert not names_nar_hash(replace(good, references=References((good.store_path,))))
    for other in ("0" * 32, "z" * 32):  # a reference to another path is none to itself
        assert names_nar_hash(replace(good, references=References((StorePath(other, "other"),))))
    assert not names_nar_hash(addressed(Method.FLAT, Hash.sha256(b"contents"), PLAIN).info)


def test_the_bytes_are_held_to_size_and_hash() -> None:
    measure(ITEM)
    for wrong in (
        ITEM.but(nar_size=ITEM.info.nar_size + 8),
        ITEM.but(nar_size=ITEM.info.nar_size - 8),
        ITEM.but(nar_hash=Hash.sha256(b"x")),
    ):
        with pytest.raises((ContentMismatch, MalformedNar, Refused)):
            measure(wrong)
    there = entry("t", A.full(STORE).encode(), references=(A,))
    assert measure(there, scan=True) == frozenset()
    assert measure(there.but(references=(A, B)), scan=True) == {B.hash_part}
    assert measure(there.but(references=(A, B))) == frozenset()


def test_a_fingerprint_has_each_reference_once_with_its_folder() -> None:
    made = fingerprint(STORE, A, ITEM.info.nar_hash, 7, (LAST, FIRST, LAST))
    refs = f"{FIRST.full(STORE)},{LAST.full(STORE)}"
    assert made == f"1;{STORE}/{A};{ITEM.info.nar_hash};7;{refs}".encode()


def text_of(item: Entry, old: str, new: str) -> bytes:
    text = item.info.render().decode()
    assert old in text
    return text.replace(old, new, 1).encode()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("StorePath: /nix/store/", "StorePath: /gnu/store/"),
        ("StorePath: /nix/store/", "StorePath: /nix/stoRe/"),
        ("StorePath: /nix/store/", "StorePath: /nix/store"),
        ("StorePath: /nix/store/", "StorePath: /nix/store/x/"),
        ("StorePath: ", "StorePath:"),
        ("URL: nar/", "URL: "), ("NarSize: ", "NarSize: 0x"), ("NarSize: ", "NarSize: -"),
        ("NarSize", "Narsize"), ("NarHash: sha256:", "NarHash: sha1:"),
        ("FileHash: sha256:", "FileHash: sha512:"), ("NarSize: ", "NarSize: 1_"),
        ("Compression: none", "Compression: None"), ("NarHash: ", "NarHash:  "), ("NarSize: ", "NarSize:1"),
        ("Compression: ", "Compression:x"),
        (f"NarHash: {ITEM.info.nar_hash}", "NarHash: sha1:" + "0" * 32),
        (f"FileHash: {ITEM.info.file_hash}", "FileHash: sha1:" + "0" * 32),
        (f"FileHash: {ITEM.info.file_hash}", "FileHash: md5:" + "0" * 32),
    ],
)  # fmt: skip
def test_a_line_beside_the_right_one(old: str, new: str) -> None:
    changed = text_of(ITEM, old, new)
    if old == "URL: nar/":
        assert NarInfo.parse(changed).url != ITEM.info.url
        return
    with pytest.raises(Malformed):
        NarInfo.parse(changed)


def test_sizes_and_counts_at_their_bounds() -> None:
    size = f"NarSize: {ITEM.info.nar_size}"
    assert NarInfo.parse(text_of(ITEM, size, f"NarSize: {MAX_SIZE}")).nar_size == MAX_SIZE
    for wrong in (0, MAX_SIZE + 1):
        with pytest.raises(Malformed):
            NarInfo.parse(text_of(ITEM, size, f"NarSize: {wrong}"))
    file = f"FileSize: {ITEM.info.file_size}"
    for value, good in ((0, True), (MAX_SIZE, True), (MAX_SIZE + 1, False)):
        changed = text_of(ITEM, file, f"FileSize: {value}")
        if good:
            assert NarInfo.parse(changed).file_size == value
        else:
            with pytest.raises(Malformed):
                NarInfo.parse(changed)
    signed = ITEM.info.with_signatures(
        tuple(Signature("k", bytes([n]) * 64) for n in range(MAX_SIGNATURES))
    ).render()
    assert len(NarInfo.parse(signed).signatures) == MAX_SIGNATURES
    with pytest.raises(Malformed):
        NarInfo.parse(signed + b"Sig: rubbish\n")
    for field in ("StorePath", "URL", "NarHash", "NarSize"):
        lines = [x for x in ITEM.info.render().splitlines() if not x.startswith(field.encode())]
        with pytest.raises(Malformed):
            NarInfo.parse(b"\n".join([*lines, b""]))


@pytest.mark.parametrize(
    "url",
    ["/x", "\\x", "http://x", "x:y", "a//b", "a/./b", "a/../b", "..", "a/", "%2e%2e/x", "a%2fb",
     "a%5cb", "a%00", "a\\b", "a#b", "%C3%A9", "a%7f", "", "?x", "a/%252e"],
)  # fmt: skip
def test_urls_that_leave_their_upstream(url: str) -> None:
    with pytest.raises(Refused):
        check_url(url)
    check_url("nar/x.nar.xz?hash=/a/../b")
    check_url("a.b/..c/x%20y")


MESSAGE = b"message"


def forged(name: str, count: int) -> list[Signature]:
    return [Signature(name, bytes([n + 1]) * 64) for n in range(count)]


def test_a_signature_has_its_length_and_a_key_has_its() -> None:
    """libsodium takes both as one text: where one ends and the other begins is ours to know."""
    message = b"1;/nix/store/a message"
    good = KEY.sign(message)
    assert KEY.public.verifies(message, good)
    assert not KEY.public.verifies(message[1:], replace(good, data=good.data + message[:1]))
    assert not KEY.public.verifies(good.data[-1:] + message, replace(good, data=good.data[:-1]))
    assert not KEY.public.verifies(good.data + message, replace(good, data=b""))
    assert not KEY.public.verifies(message, replace(good, data=bytes(64)))
    assert not KEY.public.verifies(b"", good)
    assert not replace(KEY.public, data=KEY.public.data[:-1]).verifies(message, good)
    assert not replace(KEY.public, data=KEY.public.data + b"x").verifies(message, good)


def test_a_narinfo_that_is_not_whole_has_all_that_is_evidence() -> None:
    ca = ContentAddress(Method.NAR, Hash.sha256(b"x"))
    item = ITEM.but(references=(A,), ca=ca, deriver=B, extra=(("System", "x"),))
    info = item.signed(KEY, OTHER).info
    part = NarInfo.parse(info.render(whole=False))
    assert part == replace(info, file_hash=None, file_size=None, deriver=None, extra=())
    assert part.ca and part.fingerprint() == info.fingerprint()


def test_a_ring_knows_keys_by_name_and_by_bytes() -> None:
    namesake = key("impostor")
    false = replace(namesake.sign(MESSAGE), key_name=KEY.name)
    renamed = replace(KEY.sign(MESSAGE), key_name=OTHER.name)
    ring = KeyRing.of([KEY.public], [OTHER.public, KEY.public])
    assert ring.signer(MESSAGE, [KEY.sign(MESSAGE)]) == KEY.name
    assert ring.signer(MESSAGE, [OTHER.sign(MESSAGE)]) == OTHER.name
    for wrong in (false, renamed, KEY.sign(b"other"), key("a").sign(MESSAGE),
                  key("a-10").sign(MESSAGE)):  # fmt: skip
        assert ring.signer(MESSAGE, [wrong]) is None
    assert KEY.name in ring and "a" not in ring and bool(ring) and not KeyRing.of([])
    two = KeyRing.of([KEY.public, replace(namesake.public, name=KEY.name)])
    assert two.signer(MESSAGE, [false]) == KEY.name
    assert len(list(two.keys)) == 2 and set(two.names) == {KEY.name}


def test_a_ring_without_revoked_keys() -> None:
    ring = KeyRing.of([KEY.public, OTHER.public])
    less = ring.without({KEY.name, "nobody"})
    assert less.signer(MESSAGE, [KEY.sign(MESSAGE)]) is None
    assert less.signer(MESSAGE, [KEY.sign(MESSAGE), OTHER.sign(MESSAGE)]) == OTHER.name
    assert ring.without({"a"}).signer(MESSAGE, [KEY.sign(MESSAGE)]) == KEY.name
    assert not ring.without({KEY.name, OTHER.name})


def test_a_ring_tries_so_many_and_no_more() -> None:
    ring = KeyRing.of([KEY.public])
    good = KEY.sign(MESSAGE)
    assert ring.verified(MESSAGE, [*forged(KEY.name, MAX_FAILURES - 1), good]) == (good,)
    assert ring.verified(MESSAGE, [*forged(KEY.name, MAX_FAILURES), good]) == ()
    assert ring.verified(MESSAGE, [*forged("stranger", 99), good]) == (good,)
    many = [good, *forged(KEY.name, MAX_FAILURES + 1), good]
    assert ring.verified(MESSAGE, many) == (good,)
    # a bad one does not end the search, and a good one is no failure
    both = KeyRing.of([KEY.public, OTHER.public])
    mixed = [forged(KEY.name, 1)[0], OTHER.sign(MESSAGE), KEY.sign(MESSAGE)]
    assert both.verified(MESSAGE, mixed) == tuple(mixed[1:])


def test_what_a_ring_keeps() -> None:
    ring = KeyRing.of([KEY.public])
    good, bad, strangers = KEY.sign(MESSAGE), forged(KEY.name, 1)[0], forged("stranger", 5)
    assert ring.kept(MESSAGE, [good, bad, *strangers, good], most=9) == tuple(
        sorted([good, *strangers])
    )
    assert len(ring.kept(MESSAGE, [good, *strangers], most=3)) == 3
    assert good in ring.kept(MESSAGE, [*strangers, good], most=1)
    assert ring.kept(MESSAGE, strangers, most=0) == ()


DRV = store_path("app.drv")


def test_realisations_are_of_the_output_that_was_asked_for() -> None:
    name = f"build-trace-v2/{DRV}/out.doi"
    good = f'{{"outPath":"{A}","signatures":[]}}'.encode()
    parsed = parse_at(name, good)
    assert isinstance(parsed, BuildTraceEntry) and parsed.drv_path == DRV
    others = {
        parse_at(f"build-trace-v2/{DRV}/dev.doi", good).fingerprint(),
        parse_at(f"build-trace-v2/{store_path('b.drv')}/out.doi", good).fingerprint(),
        parse_at(name, good.replace(str(A).encode(), str(B).encode())).fingerprint(),
        parsed.fingerprint(),
    }
    assert len(others) == 4
    for wrong in (
        f"build-trace-v2/{A}/out.doi", f"build-trace-v2/{DRV}/o ut.doi", f"x/{name}", f"{name}x",
        f"build-trace-v2/{DRV}/a/out.doi",
    ):  # fmt: skip
        with pytest.raises(NarsealError):
            parse_at(wrong, good)
    for bad in (
        good.replace(b'"signatures"', b'"sig"'),
        good.replace(b"{", b'{"x":1,', 1),
        good.replace(b"{", f'{{"outPath":"{A}",'.encode(), 1),
        b"[]",
        good.replace(b"[]", b"7"),
    ):
        with pytest.raises(NarsealError):
            parse_at(name, bad)
    ident, other = (f"sha256:{c * 64}!out" for c in "ab")
    # what is signed knows no order of what it depends on
    orders = ({ident: A, other: B}, {other: B, ident: A})
    assert len({Realisation(ident, A, order).fingerprint() for order in orders}) == 1
    old = f'{{"id":"{ident}","outPath":"{A}"}}'.encode()
    assert isinstance(parse_at(f"realisations/{ident}.doi", old), Realisation)
    with pytest.raises(NarsealError, match="another output"):
        parse_at(f"realisations/{other}.doi", old)


def test_a_self_reference_is_blanked_wherever_it_stands() -> None:
    import hashlib

    part = A.hash_part
    needle = part.encode()
    for text in (needle, b"x" + needle, needle + needle, b"x" * 40 + needle + b"y", b"x" * 10):
        blanked = text.replace(needle, bytes(32))
        for step in (1, 31, 32, 33, 1000):
            modulo = HashModulo("sha256", part)
            for begin in range(0, len(text), step):
                modulo.update(text[begin : begin + step])
            placed, plain = modulo.digests()
            assert plain == hashlib.sha256(blanked).digest()
            assert (placed is None) == (needle not in text)
            assert placed != plain


def test_a_reference_that_stands_there_twice_counts_once() -> None:
    twice = text_of(ITEM, "References: ", f"References: {LAST} {FIRST} {LAST}")
    assert tuple(NarInfo.parse(twice).references) == (FIRST, LAST)


def test_a_store_folder_is_absolute_and_has_no_end() -> None:
    assert check_store_dir("/nix/store") == "/nix/store"
    for wrong in ("", "nix/store", "/nix/store/", "/nix//store", "/nix/../store", "/nix store"):
        with pytest.raises(Malformed):
            check_store_dir(wrong)


_PART = "0" * 32


@pytest.mark.parametrize(
    "wrong",
    [
        "x", f"{_PART}x-a", f"{_PART}-", f"{_PART}-.", f"{_PART}-..", f"{_PART}-.-a", f"{_PART}-..-a",
        f"{_PART}-{'n' * 212}", f"{_PART}-a/b", f"{_PART}-a\n", f"{'e' * 32}-a", f"{_PART}-é",
    ],
)  # fmt: skip
def test_many_references_are_held_to_the_rules_of_one(wrong: str) -> None:
    """They are matched in one go: what the constructor refuses is refused among others, too."""
    with pytest.raises(MalformedStorePath):
        StorePath.parse(wrong)
    for text in (wrong, f"{A} {wrong}", f"{wrong} {A}"):
        with pytest.raises(MalformedStorePath):
            References.parse(text)


@pytest.mark.parametrize("name", ["a", "n" * 211, ".a", "..a", "...", "-", "=?+._-"])
def test_names_that_a_store_path_may_have(name: str) -> None:
    path = StorePath(_PART, name)
    assert (path.hash_part, path.name, str(path)) == (_PART, name, f"{_PART}-{name}")
    assert tuple(References.parse(f" {A}  {path} {path} ")) == tuple(sorted((A, path)))
    assert References((path, A)).with_hash_part(_PART) == path
    assert References((A,)).with_hash_part(_PART) is None


def test_two_references_of_one_hash_part_are_refused() -> None:
    with pytest.raises(MalformedStorePath, match="same hash part"):
        References.parse(f"{_PART}-a {A} {_PART}-b")
    with pytest.raises(MalformedNarInfo, match="same hash part"):
        replace(ITEM.info, references=References((StorePath(ITEM.hash, "other"),)))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"[" + b"[]," * 500_000 + b"1]", "over 400000 values"),
        (b"[" * 40_000 + b"]" * 40_000, "nests deeper than 100"),
        (b"[" * 100_000 + b"]" * 100_000, "nests deeper than 100"),
        (b"[" * 2_000 + b"]" * 2_000, "nests deeper than 100"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "nests deeper than 100"),
        (b'["]]]]]]]]",' + b"[" * 100 + b"]" * 101, "nests deeper than 100"),
        (b'["' + b"x" * (5 << 20) + b'",' + b"1," * 40_000 + b"1]", "over 4 MiB"),
        (b"[" + b"1" * (5 << 20) + b"," + b"1," * 40_000 + b"1]", "over 4 MiB"),
        (b"[" + b"1," * 40_000 + b"]", "is not JSON"),
        (b"[" + b"1," * 40_000 + b"1]x", "is not JSON"),
        (b"[" + b"1," * 40_000 + b"1", "is not JSON"),
        (b'{"a":1,"a":1}', "twice"),
        (b"[NaN]", "no number"),
    ],
)
def test_json_that_is_not_taken(data: bytes, sentence: str) -> None:
    with pytest.raises(Malformed, match=sentence):
        load_json(data, what="it")


@pytest.mark.parametrize(
    "tree",
    [
        {"few": "x" * (10 << 20)},
        {"many": [{"n": str(n)} for n in range(100_000)]},
        {"commas": ",[{" * 100_000, "rest": [1.5, None, True]},
        {"deep": json.loads("[" * 99 + "]" * 99), "wide": [[]] * 200, "texts": "[{" * 9_000},
        {"texts": ["x" * (2 << 20)] * 3, "many": [1] * 50_000},
    ],
)
def test_json_that_is_taken(tree: object) -> None:
    assert load_json(json.dumps(tree).encode(), what="it") == tree


def test_a_shape_is_what_the_outermost_object_says() -> None:
    data = b'{"version": 1, "root": {"entries": [1, {"root": 2}]}, "list": [], "text": "t"}'
    found = check_shape(io.BytesIO(data), what="it", depth=4, values=9)
    assert found == {"version": 1, "root": {}, "list": [], "text": "t"}
    for depth, values in ((3, 9), (4, 8)):
        with pytest.raises(Malformed, match="deeper"):
            check_shape(io.BytesIO(data), what="it", depth=depth, values=values)
