"""Two zstd libraries beside each other: `backports.zstd`, which narseal uses, and `zstandard`.

What must hold for bytes from outside is tried first, of each way that zstandard has to decompress a
stream; then their processor time, for small NARs and a large one.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import zstandard

from narseal.errors import Refused
from narseal.nix.compression import decompressor, zstd_compressor
from tests.bench.table import Row

_LARGE = 100 << 20
_PIECE = 1 << 18
_WINDOW = 1 << 23  # what a Content-Encoding may ask for
_CONTEXT = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
_SKIPPABLE = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"


def _narseal(data: bytes, portion: int = _PIECE) -> Iterator[bytes]:
    decoder = decompressor("zstd", small=True)
    for at in range(0, len(data), portion):
        yield from decoder.feed(data[at : at + portion])
    decoder.finish()


def _stream_reader(data: bytes, portion: int = _PIECE) -> Iterator[bytes]:
    opened = zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(
        io.BytesIO(data), read_size=portion, read_across_frames=True
    )
    while piece := opened.read(_PIECE):
        yield piece


def _decompressobj(data: bytes, portion: int = _PIECE) -> Iterator[bytes]:
    """With a frame's end and what stands behind it as `zlib` has them."""
    maker = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
    frame = maker.decompressobj()
    for at in range(0, len(data), portion):
        rest = data[at : at + portion]
        while rest:
            if frame.eof:
                frame = maker.decompressobj()
            yield frame.decompress(rest)
            rest = frame.unused_data
    if not frame.eof:
        raise Refused("truncated", "")


def _stream_writer(data: bytes, portion: int = _PIECE) -> Iterator[bytes]:
    pieces: list[bytes] = []

    class Sink(io.BytesIO):
        def write(self, piece: Any, /) -> int:
            pieces.append(bytes(piece))
            return len(piece)

    maker = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
    opened = maker.stream_writer(Sink(), write_size=_PIECE)
    for at in range(0, len(data), portion):
        opened.write(data[at : at + portion])
        yield from pieces
        pieces.clear()


def _decompress(data: bytes) -> Iterator[bytes]:
    """Small ones whole, in memory that was there before."""
    yield _CONTEXT.decompress(data, max_output_size=_PIECE)


WAYS: dict[str, Callable[[bytes], Iterator[bytes]]] = {
    "narseal": _narseal,
    "stream_reader": _stream_reader,
    "decompressobj": _decompressobj,
    "stream_writer": _stream_writer,
    "decompress": _decompress,
}


def measure() -> list[Row]:
    """What fails where a stream may come from anybody, and MB a second of processor time."""
    rows = [_failures(name) for name in WAYS]
    for size, name in ((4 << 10, "4 KiB"), (64 << 10, "64 KiB"), (_LARGE, "100 MB")):
        plain = _like_a_nar(size)
        file = _compressed_by_ours(plain)
        rounds = max(1, (4 << 20) // size)
        for way in list(WAYS)[1 : None if size <= _PIECE else -1]:
            rows.append(
                _row(f"{name}: decompress, `{way}`", size, rounds, partial(_drain, _narseal, file),
                     partial(_drain, WAYS[way], file))
            )  # fmt: skip
        for threads in (0, 2) if size == _LARGE else (0,):
            how = f"`threads={threads}`" if threads else "one thread"
            rows.append(
                _row(f"{name}: compress at level 3, {how}", size, rounds,
                     partial(_compressed_by_ours, plain), partial(_by_zstandard, plain, threads))
            )  # fmt: skip
    return rows


def _failures(name: str) -> Row:
    """Which promises of `narseal.nix.compression` a way to decompress does not keep."""
    text = b"some text " * 2000
    file = _compressed_by_ours(text)
    wide = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=25)
    ).compress(os.urandom(34 << 20))
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    cut = all(_refused(name, file[:at]) for at in range(len(file)))
    held = {
        "pieces are bounded": max(map(len, WAYS[name](bomb))) <= 1 << 20,
        "a cut stream is an error": cut,
        "so are bytes behind it": _refused(name, file + b"x") and _refused(name, file + b"(\xb5"),
        "frames follow each other": _whole(name, file * 3) == text * 3,
        "frames are skipped": _whole(name, _SKIPPABLE + file + _SKIPPABLE) == text,
        "windows are bounded": _refused(name, wide),
        "checksums are compared": _refused(name, file[:-1] + bytes([file[-1] ^ 1])),
    }
    missing = [what for what, holds in held.items() if not holds]
    theirs = "; ".join(f"not: {what}" for what in missing) or f"all {len(held)} hold"
    ours = theirs if name == "narseal" else ""
    what = "narseal's decoder" if name == "narseal" else f"zstandard's `{name}`"
    return Row(f"promises kept by {what}", ours, "" if ours else theirs, None, "")


def _whole(name: str, data: bytes) -> bytes | None:
    try:
        return b"".join(WAYS[name](data))
    except (Refused, zstandard.ZstdError):
        return None


def _refused(name: str, data: bytes) -> bool:
    return _whole(name, data) is None


def _drain(way: Callable[[bytes], Iterator[bytes]], data: bytes) -> None:
    for _ in way(data):
        pass


def _compressed_by_ours(plain: bytes) -> bytes:
    compressor = zstd_compressor(3)
    pieces = [compressor.compress(plain[at : at + _PIECE]) for at in range(0, len(plain), _PIECE)]
    return b"".join([*pieces, compressor.flush()])


def _by_zstandard(plain: bytes, threads: int) -> bytes:
    maker = zstandard.ZstdCompressor(level=3, write_checksum=True, threads=threads)
    compressor = maker.compressobj()
    pieces = [compressor.compress(plain[at : at + _PIECE]) for at in range(0, len(plain), _PIECE)]
    return b"".join([*pieces, compressor.flush()])


def _like_a_nar(size: int) -> bytes:
    """This interpreter's own library, again and again: farther apart than a window."""
    found = bytearray()
    folder = os.path.dirname(os.__file__)
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            with open(os.path.join(place, name), "rb") as file:
                found += file.read()
            if len(found) >= size:
                return bytes(found[:size])
    more = -(-size // len(found))
    return bytes((found * more)[:size])


def _row(
    what: str, size: int, rounds: int, ours: Callable[[], object], theirs: Callable[[], object]
) -> Row:
    """The best of some turns, each of `rounds`, in processor time."""
    seconds = [
        min(each) for each in zip(*(_turn(rounds, ours, theirs) for _ in range(5)), strict=True)
    ]
    mine, other = (size * rounds / taken / 1e6 for taken in seconds)
    return Row(f"zstd, {what} (CPU)", f"{mine:,.0f} MB/s", f"{other:,.0f} MB/s", mine / other, "")


def _turn(rounds: int, *runs: Callable[[], object]) -> list[float]:
    taken = []
    for run in runs:
        begun = time.process_time()
        for _ in range(rounds):
            run()
        taken.append(time.process_time() - begun)
    return taken
