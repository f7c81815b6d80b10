"""Inclusion proofs from tiles, held against RFC 6962 as it stands."""

from __future__ import annotations

import hashlib

from hypothesis import given, settings
from hypothesis import strategies as st

from narseal.cosign import tiles


def leaf_hash(leaf: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + leaf).digest()


def node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def mth(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1: the Merkle Tree Hash."""
    if len(leaves) == 1:
        return leaf_hash(leaves[0])
    k = 1 << ((len(leaves) - 1).bit_length() - 1)
    return node(mth(leaves[:k]), mth(leaves[k:]))


def path(m: int, leaves: list[bytes]) -> list[bytes]:
    """RFC 6962, section 2.1.1: the audit path."""
    if len(leaves) == 1:
        return []
    k = 1 << ((len(leaves) - 1).bit_length() - 1)
    if m < k:
        return [*path(m, leaves[:k]), mth(leaves[k:])]
    return [*path(m - k, leaves[k:]), mth(leaves[:k])]


def proved(leaf: bytes, index: int, size: int, proof: list[bytes]) -> bytes:
    """RFC 9162, section 2.1.3.2: the root that a proof leads to."""
    fn, sn, root = index, size - 1, leaf_hash(leaf)
    for found in proof:
        assert sn
        if fn & 1 or fn == sn:
            root = node(found, root)
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            root = node(root, found)
        fn, sn = fn >> 1, sn >> 1
    assert sn == 0
    return root


class TiledLog:
    """C2SP tlog-tiles, only with the files that a log of that size has."""

    def __init__(self, leaves: list[bytes]) -> None:
        self.files: dict[str, bytes] = {}
        level, hashes = 0, [leaf_hash(leaf) for leaf in leaves]
        while hashes:
            for start in range(0, len(hashes), 256):
                part = hashes[start : start + 256]
                self.files[self.name(str(level), start // 256, len(part))] = b"".join(part)
            full = [hashes[at : at + 256] for at in range(0, len(hashes) - 255, 256)]
            hashes = [self.fold(part) for part in full]
            level += 1
        for start in range(0, len(leaves), 256):
            group = leaves[start : start + 256]
            data = b"".join(len(leaf).to_bytes(2, "big") + leaf for leaf in group)
            self.files[self.name("entries", start // 256, len(group))] = data

    @staticmethod
    def fold(hashes: list[bytes]) -> bytes:
        while len(hashes) > 1:
            hashes = [node(a, b) for a, b in zip(hashes[::2], hashes[1::2], strict=True)]
        return hashes[0]

    @staticmethod
    def name(kind: str, number: int, width: int) -> str:
        text = f"{number:03}" if number < 1000 else f"x{number // 1000:03}/{number % 1000:03}"
        return f"tile/{kind}/{text}" + (f".p/{width}" if width < 256 else "")


@settings(max_examples=60)
@given(st.integers(1, 700), st.data())
def test_proof_from_tiles_is_that_of_the_rfc(size: int, data: st.DataObject) -> None:
    leaves = [b"entry %d" % n for n in range(size)]
    index = data.draw(st.integers(0, size - 1))
    log = TiledLog(leaves)
    proof = tiles.inclusion_proof(log.files.__getitem__, index, size)
    assert proof == path(index, leaves)
    assert proved(leaves[index], index, size, proof) == mth(leaves)
    assert tiles.entry(log.files.__getitem__, index, size) == leaves[index]


def test_tiles_of_large_logs_are_named_as_the_specification_says() -> None:
    asked: list[str] = []

    def read(name: str) -> bytes:
        asked.append(name)
        return bytes(256 * 32)

    tiles.inclusion_proof(read, 70_000 * 256 + 5, 70_000 * 256 + 6)
    assert "tile/0/x070/000.p/6" in asked
    assert "tile/1/273.p/112" in asked
    assert "tile/2/001.p/17" in asked
