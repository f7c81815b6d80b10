"""The compressions of a NAR: names, file suffixes, magic bytes, and bounded streaming decoders.

A decoder never returns more than it is asked for, whatever the input promises, reads concatenated
frames to their end, and refuses bytes behind the last one. Its work is bounded by what comes in and
what goes out: frames that hold next to nothing are refused when there are many.
"""

from __future__ import annotations

import bz2
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

import brotli

from narseal.errors import Refused
from narseal.nix.base32 import CHARS

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

#: Every `Compression:` value that Nix reads without giving up, and its file suffix.
COMPRESSIONS = {
    "none": "",
    "xz": ".xz",
    "bzip2": ".bz2",
    "gzip": "",
    "zstd": ".zst",
    "br": ".br",
    "lzip": ".lzip",
    "lz4": ".lz4",
    "lzma": "",
    "compress": "",
}
_FILE = re.compile(rf"{CHARS}{{52}}\.nar(\.[a-z0-9]{{2,4}})?", re.ASCII)


def is_file_name(file: str, compression: str) -> bool:
    """Whether a file below nar/ may be called so, with this compression: `<nix32>.nar<suffix>`.

    Several compressions have no suffix: the name alone does not say which it is.
    """
    match = _FILE.fullmatch(file)
    return match is not None and (match[1] or "") == COMPRESSIONS.get(compression)


#: First bytes of those formats that have them.
MAGIC = {
    "xz": b"\xfd7zXZ\x00",
    "bzip2": b"BZh",
    "gzip": b"\x1f\x8b",
    "zstd": b"\x28\xb5\x2f\xfd",
    "none": b"\x0d\x00\x00\x00\x00\x00\x00\x00nix-archive-1",
}
#: Values of `Content-Encoding` as HTTP and as Nix's `narinfo-compression` write them.
CONTENT_ENCODINGS = {
    "identity": "none",
    "x-gzip": "gzip",
    **{name: name for name in ("gzip", "zstd", "br", "xz", "bzip2", "none", "lzma")},
}

_STEP = 1 << 18
_SLICE = 1 << 14  # bytes that a frame gets at a time: so many it can hand back when it ends
_FREE_FRAMES = 1024
_FRAME_BYTES = 1024  # of plain bytes that each frame beyond those must stand for
_XZ_MEMORY = 192 << 20  # xz -9 takes 65 MiB
_ZSTD_WINDOW_LOG = 27  # zstd --long
_SMALL_XZ_MEMORY = 80 << 20  # xz -9; taken as it is filled
_SMALL_ZSTD_WINDOW_LOG = 23  # RFC 9659: no more in a Content-Encoding


class _Frame(Protocol):
    """What lzma's, bz2's and our other decompressors have in common."""

    def decompress(self, data: bytes, max_length: int) -> bytes: ...

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    @property
    def needs_input(self) -> bool: ...


def decompressor(compression: str, *, small: bool = False) -> Decompressor:
    """A decoder for one NAR; Refused where narseal cannot decode, so cannot verify.

    With `small`, for another file, whose frames may not claim the memory that a NAR's may.
    """
    if compression == "none":
        return Plain()
    if compression == "br":
        return _Brotli()
    if compression in _FRAMES:
        return _Framed(_FRAMES[compression], small=small)
    raise Refused(
        "unsupported-compression",
        f"a NAR compressed with {compression} cannot be verified; let the upstream use zstd or xz",
    )


class Decompressor(Protocol):
    """A push decoder of one compressed stream."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Pieces of plain bytes, each at most 1 MiB, that `data` completes."""

    def finish(self) -> None:
        """Refused("truncated") if the stream had not ended."""


class Plain:
    """Compression: none."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """See Decompressor.feed."""
        yield data

    def finish(self) -> None:
        """See Decompressor.finish: any end is an end."""


class _Framed:
    """xz, zstd, bzip2, gzip, lzma: one frame after another, nothing between or behind."""

    def __init__(self, make: Callable[[bool], _Frame], *, small: bool) -> None:
        self._make = make
        self._small = small
        self._frame = make(small)
        self._frames = 1
        self._plain = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        at = 0
        while at < len(data):
            piece = data[at : at + _SLICE]
            at += len(piece)
            yield from self._feed_slice(piece)

    def finish(self) -> None:
        if not self._frame.eof:
            raise Refused("truncated", "the compressed bytes end before their stream does")

    def _feed_slice(self, data: bytes) -> Iterator[bytes]:
        while True:
            if self._frame.eof:
                if not data:
                    return
                self._begin_frame()
            try:
                piece = self._frame.decompress(data, _STEP)
            except (lzma.LZMAError, zstd.ZstdError, zlib.error, OSError, ValueError) as error:
                raise Refused("corrupt", f"the compressed bytes do not decode: {error}") from error
            if piece:
                self._plain += len(piece)
                yield piece
            if self._frame.eof:
                data = self._frame.unused_data
            elif self._frame.needs_input:
                return
            else:
                data = b""

    def _begin_frame(self) -> None:
        self._frames += 1
        if self._frames > _FREE_FRAMES + self._plain // _FRAME_BYTES:
            raise Refused("corrupt", f"{self._frames} compressed frames that hold next to nothing")
        self._frame = self._make(self._small)


class _Gzip:
    """zlib's decompressor with the interface of lzma's."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        piece = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        self.needs_input = not self._inner.unconsumed_tail and len(piece) < max_length
        return piece


def _lzma(form: int, *, small: bool) -> _Frame:
    return lzma.LZMADecompressor(form, memlimit=_SMALL_XZ_MEMORY if small else _XZ_MEMORY)


def _zstd(*, small: bool) -> _Frame:
    window = _SMALL_ZSTD_WINDOW_LOG if small else _ZSTD_WINDOW_LOG
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: window})


_FRAMES: dict[str, Callable[[bool], _Frame]] = {
    "xz": lambda small: _lzma(lzma.FORMAT_XZ, small=small),
    "lzma": lambda small: _lzma(lzma.FORMAT_ALONE, small=small),
    "zstd": lambda small: _zstd(small=small),
    "bzip2": lambda _: bz2.BZ2Decompressor(),
    "gzip": lambda _: _Gzip(),
}


class _Brotli:
    """Brotli, a piece at a time."""

    def __init__(self) -> None:
        self._inner = brotli.Decompressor()

    def feed(self, data: bytes) -> Iterator[bytes]:
        if data and self._inner.is_finished():
            raise Refused("corrupt", "bytes behind the end of the brotli stream")
        try:
            piece = self._inner.process(data, output_buffer_limit=_STEP)
            while piece:
                yield piece
                piece = self._inner.process(b"", output_buffer_limit=_STEP)
        except brotli.error as error:
            raise Refused("corrupt", f"the compressed bytes do not decode: {error}") from error

    def finish(self) -> None:
        if not self._inner.is_finished():
            raise Refused("truncated", "the compressed bytes end before their stream does")


def zstd_compressor(level: int) -> zstd.ZstdCompressor:
    """A streaming compressor whose frame carries a checksum; level 1 to 19."""
    options: dict[int, int] = {
        zstd.CompressionParameter.compression_level: level,
        zstd.CompressionParameter.checksum_flag: 1,
    }
    return zstd.ZstdCompressor(options=options)
