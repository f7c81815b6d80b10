"""How the C library keeps memory that was freed."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_LARGE = 1 << 20


def give_back_large() -> None:
    """Let blocks of 1 MiB and more go back to the kernel as soon as they are freed.

    By itself, glibc takes a large block that was freed as a sign that more will come, and keeps up to
    twice its size for each thread (mallopt(3), M_MMAP_THRESHOLD): four bundles of 7 MiB, read one
    after another, had left 100 MiB. Elsewhere nothing happens.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
