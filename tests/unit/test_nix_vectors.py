"""The nix room against what real Nix made (tests/vectors/nix.json, by tests/tools/vectors.py)."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from narseal.errors import (
    ContentMismatch,
    MalformedHash,
    MalformedKey,
    MalformedRealisation,
    MalformedStorePath,
)
from narseal.nix import nar
from narseal.nix.cache_info import CacheInfo
from narseal.nix.hashes import Hash
from narseal.nix.inspection import Inspection
from narseal.nix.keys import PublicKey, SecretKey, Signature
from narseal.nix.nar_reader import NarReader
from narseal.nix.narinfo import NarInfo
from narseal.nix.realisation import BuildTraceEntry, Realisation
from narseal.nix.references import ReferenceScanner
from narseal.nix.store_path import StorePath

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "nix.json").read_text())
NARINFOS = VECTORS["narinfos"]
PUBLIC = PublicKey.parse(VECTORS["public_key"])


@pytest.mark.parametrize("row", VECTORS["hashes"], ids=lambda row: row["algorithm"])
def test_every_spelling_of_a_hash_is_the_same_value(row: dict[str, str]) -> None:
    algorithm = row["algorithm"]
    parsed = {
        Hash.parse(row["sri"]),
        *(Hash.parse(f"{algorithm}:{row[form]}") for form in ("nix32", "hex", "base64")),
        Hash.parse(f"{algorithm}:{row['hex'].upper()}"),
        Hash.parse(row["sri"].rstrip("=")),
    }
    assert len(parsed) == 1
    value = parsed.pop()
    assert (value.nix32, value.hex, value.sri) == (row["nix32"], row["hex"], row["sri"])


@pytest.mark.parametrize(
    "text",
    [
        "", "sha256", "sha256:", "SHA256:" + "0" * 64, "0" * 64, "sha256:" + "z" * 52,
        "sha256:" + "0" * 51 + "A", "sha256:" + "0" * 51 + "\n", "sha256-" + "0" * 64,
        "sha256:" + "0" * 63 + "g", "md4:" + "0" * 32, "sha256:" + "A" * 42 + "B=",
        "sha256:" + "٠" * 52,
    ],
)  # fmt: skip
def test_what_nix_rejects_as_a_hash_is_malformed(text: str) -> None:
    with pytest.raises(MalformedHash):
        Hash.parse(text)


@pytest.mark.parametrize(
    "text",
    ["", "a", "0" * 32, "0" * 32 + "-", "0" * 31 + "e-x", "0" * 32 + "-a/b", "0" * 32 + "-..",
     "0" * 32 + "-.", "0" * 32 + "-.-x", "0" * 32 + "-" + "x" * 212, "0" * 32 + "-x\n",
     "0" * 32 + "-ü"],
)  # fmt: skip
def test_what_nix_rejects_as_a_store_path_is_malformed(text: str) -> None:
    with pytest.raises(MalformedStorePath):
        StorePath.parse(text)


def test_keys_are_read_and_written_as_nix_writes_them() -> None:
    text = VECTORS["secret_key"]
    secret = SecretKey.parse(text)
    assert secret.render() == text
    assert str(secret.public) == VECTORS["public_key"]
    assert SecretKey.parse(text + "\n") == secret
    assert text.partition(":")[2][:20] not in repr(secret)


@pytest.mark.parametrize(
    "text", ["", "x", ":AAAA", "a b:AAAA", "x:AAAA", "x:" + "A" * 88, "x:!" + "A" * 85 + "=="]
)
def test_malformed_keys(text: str) -> None:
    for parse in (SecretKey.parse, PublicKey.parse, Signature.parse):
        if parse is not Signature.parse or len(text) < 80:
            with pytest.raises(MalformedKey):
                parse(text)


def test_a_secret_key_whose_halves_do_not_match_is_malformed() -> None:
    with pytest.raises(MalformedKey):
        SecretKey.parse("x:" + base64.b64encode(bytes(64)).decode())


@pytest.mark.parametrize("name", NARINFOS)
def test_a_narinfo_of_nix_is_rendered_byte_for_byte(name: str) -> None:
    info = NarInfo.parse(NARINFOS[name].encode())
    assert info.render().decode() == NARINFOS[name]


@pytest.mark.parametrize("name", [name for name in NARINFOS if "Sig:" in NARINFOS[name]])
def test_nix_signed_our_fingerprint(name: str) -> None:
    info = NarInfo.parse(NARINFOS[name].encode())
    secret = SecretKey.parse(VECTORS["secret_key"])
    for signature in info.signatures:
        assert PUBLIC.verifies(info.fingerprint(), signature)
        assert secret.sign(info.fingerprint()) == signature


@pytest.mark.parametrize("name", NARINFOS)
def test_inspection_accepts_what_nix_made_and_nothing_near_it(name: str) -> None:
    info = NarInfo.parse(NARINFOS[name].encode())
    data = base64.b64decode(VECTORS["nars"][info.url.removeprefix("nar/")])
    inspection = Inspection(info)
    for at in range(0, len(data), 13):
        inspection.feed(data[at : at + 13])
    measured = inspection.finish()
    assert (measured.file_hash, measured.file_size) == (info.file_hash, info.file_size)
    if info.ca:
        path = info.store_path
        computed = info.ca.store_path(
            path.name, info.references, self_hash=path.hash_part, store_dir="/nix/store"
        )
        assert computed == path
        # the same content under a CA of another content
        other = type(info.ca)(
            info.ca.method, Hash(info.ca.hash.algorithm, bytes(len(info.ca.hash.digest)))
        )
        from dataclasses import replace

        wrong = Inspection(replace(info, ca=other))
        wrong.feed(data)
        with pytest.raises(ContentMismatch):
            wrong.finish()


def test_added_paths_are_among_the_narinfos() -> None:
    names = {f"{path[11:43]}.narinfo" for path in VECTORS["added"].values()}
    assert names <= NARINFOS.keys()


def test_nar_of_a_tree_is_what_nix_dumps() -> None:
    tree = nar.Directory(
        {
            b"a": nar.Regular(b"hello"),
            b"a+b c": nar.Regular(b"12345678"),
            b"b": nar.Directory(
                {
                    b"run": nar.Regular(b"#!/bin/sh\n", executable=True),
                    b"link": nar.Symlink(b"../a"),
                }
            ),
            b"empty": nar.Directory({}),
            b"z": nar.Regular(b""),
        }
    )
    dump = base64.b64decode(VECTORS["dump"])
    assert b"".join(nar.render(tree)) == dump
    reader = NarReader(max_size=len(dump))
    reader.feed(dump)
    assert reader.finish().nar_hash.nix32 == VECTORS["dump_hash"]


@pytest.mark.parametrize("name", VECTORS["realisations"])
def test_realisations_of_nix(name: str) -> None:
    text = VECTORS["realisations"][name]
    parsed = Realisation.parse(text.encode(), id=name.removeprefix("realisations/")[:-4])
    assert parsed.render().decode() == text
    assert PUBLIC.verifies(parsed.fingerprint(), parsed.signatures[0])


def test_build_trace_entry_signs_key_and_value() -> None:
    drv = StorePath("0" * 32, "x.drv")
    entry = BuildTraceEntry(drv, "out", StorePath("1" * 32, "x"))
    secret = SecretKey.parse(VECTORS["secret_key"])
    assert entry.fingerprint() == (
        b'{"key":{"drvPath":"00000000000000000000000000000000-x.drv","outputName":"out"},'
        b'"value":{"outPath":"11111111111111111111111111111111-x"}}'
    )
    signed = entry.with_signatures((secret.sign(entry.fingerprint()),))
    assert BuildTraceEntry.parse(signed.render(), drv_path=drv, output_name="out") == signed


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{}", b"{", b'{"outPath":"x"}', b"[" * 10_000,
     b'{"id":"sha256:00!out","outPath":"x"}', b'{"outPath":1,"outPath":2}', b"\xff", b'"x"'],
)  # fmt: skip
def test_malformed_realisations(data: bytes) -> None:
    with pytest.raises(MalformedRealisation):
        Realisation.parse(data, id="sha256:" + "0" * 64 + "!out")


def test_cache_info() -> None:
    assert CacheInfo.parse(VECTORS["cache_info"]) == CacheInfo("/nix/store")
    info = CacheInfo("/nix/store", want_mass_query=True, priority=30)
    assert CacheInfo.parse(info.render()) == info
    assert CacheInfo.parse("StoreDir: /x\r\nnonsense\nPriority: 7\r\n") == CacheInfo("/x", False, 7)


def test_references_are_found_across_portions() -> None:
    parts = [c * 32 for c in "0123456789"]
    text = ("x" * 40 + "-".join(parts[:5])).encode() + b"\0" + parts[6].encode()[:31]
    for portion in (1, 31, 33, 1000):
        scanner = ReferenceScanner(parts)
        for at in range(0, len(text), portion):
            scanner.feed(text[at : at + portion])
        assert scanner.found == set(parts[:5])
