"""Memory for private keys: locked, left out of core dumps and of children, cleared at the end.

Python copies `bytes` as it likes and never clears them, so a key is read from its file straight into
such memory, decoded there, and handed to libsodium by its address. What libraries for other keys
(OpenSSL) do is their own; a token or another process is the answer to that.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
from typing import Any

from nacl._sodium import ffi, lib

_PR_SET_DUMPABLE = 4
_ALPHABET = {
    ord(character): value
    for value, character in enumerate(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    )
}


class Locked:
    """Some bytes in pages of their own. `close` clears them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError, AttributeError):
            self._map.madvise(18)  # MADV_WIPEONFORK, which the mmap module does not name
        self.view = memoryview(self._map)
        #: The address, as libsodium takes it.
        self.pointer: Any = ffi.from_buffer("unsigned char[]", self._map)
        #: Whether the pages stay out of swap; the limit on locked memory can forbid it.
        self.is_locked = lib.sodium_mlock(self.pointer, size) == 0

    def close(self) -> None:
        """Overwrite with zeros."""
        lib.sodium_memzero(self.pointer, self.size)

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Locked {self.size} bytes>"

    def __reduce__(self) -> str:
        raise TypeError("a private key is not copied")


def decode_base64(source: memoryview, target: memoryview) -> bool:
    """Decode canonical base64 from one locked place into another; whether it filled it exactly.

    Byte by byte, so that no copy is left behind.
    """
    size = len(target)
    padding = -size % 3
    if len(source) != (size + 2) // 3 * 4:
        return False
    bits = count = at = 0
    for position, code in enumerate(source):
        if position >= len(source) - padding:
            if code != ord("="):
                return False
            continue
        value = _ALPHABET.get(code)
        if value is None:
            return False
        bits = (bits << 6 | value) & 0xFFFF
        count += 6
        if count >= 8:
            count -= 8
            target[at] = bits >> count & 0xFF
            at += 1
    return at == size and not bits & (1 << count) - 1


def forbid_dumps() -> None:
    """No core dump of this process, and nobody of the same user looks into it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0)


def lock_all() -> bool:
    """Keep the whole process out of swap, if the limit (LimitMEMLOCK) allows it."""
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.mlockall(3) == 0)


def read_into(descriptor: int, target: memoryview) -> int:
    """Read a file's bytes straight into locked memory; how many there were."""
    taken = 0
    while taken < len(target) and (count := os.readv(descriptor, [target[taken:]])):
        taken += count
    return taken
