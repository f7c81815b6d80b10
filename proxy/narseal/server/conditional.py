"""The Range header (RFC 9110, section 14): one span of bytes, or the whole."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SPAN = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes from `start` up to, not including, `stop`."""

    start: int
    stop: int


class Unsatisfiable(ValueError):
    """The range begins behind the end: 416."""


def parse_range(header: str | None, size: int) -> Span | None:
    """The span that a header asks for of `size` bytes; None for the whole.

    What is not one well-formed span of bytes is passed over, as the RFC has it.
    """
    match = _SPAN.fullmatch(header.strip()) if header else None
    if not match or not (match[1] or match[2]):
        return None
    if not match[1]:
        length = min(int(match[2]), size)
        if not length:
            raise Unsatisfiable
        return Span(size - length, size)
    start = int(match[1])
    stop = min(int(match[2]) + 1, size) if match[2] else size
    if match[2] and int(match[2]) < start:
        return None
    if start >= size:
        raise Unsatisfiable
    return Span(start, stop)


def etag_matches(header: str | None, etag: str) -> bool:
    """Whether an If-None-Match or If-Range header names `etag` (quoted, strong)."""
    if header is None:
        return False
    names = [name.strip().removeprefix("W/") for name in header.split(",")]
    return "*" in names or etag in names
