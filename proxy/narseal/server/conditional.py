"""Conditions and ranges of a request (RFC 9110, sections 13 and 14), and the small answers to it."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass

from aiohttp import web

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


def etag_of(body: bytes) -> str:
    """The ETag of a small body."""
    return f'"{hashlib.sha256(body).hexdigest()[:32]}"'


def file_etag(file: str) -> str:
    """The ETag of a NAR file: its name is its content's."""
    return f'"{file}"'


def etag_of_file(descriptor: int) -> str:
    """The ETag of a file that is replaced, and never changed, under its name."""
    status = os.fstat(descriptor)
    return f'"{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}"'


def cache(control: str) -> dict[str, str]:
    """The header field of a Cache-Control."""
    return {"Cache-Control": control}


def caching(control: str, etag: str) -> dict[str, str]:
    """The header fields of what has an ETag and ranges."""
    return {"Cache-Control": control, "ETag": etag, "Accept-Ranges": "bytes"}


def span_of(request: web.Request, size: int, etag: str) -> Span | web.Response | None:
    """The range that is asked for, or the answer that it cannot be had."""
    condition = request.headers.get("If-Range")
    if condition is not None and not etag_matches(condition, etag):
        return None
    try:
        return parse_range(request.headers.get("Range"), size)
    except Unsatisfiable:
        headers = {"Content-Range": f"bytes */{size}", "Accept-Ranges": "bytes"}
        return web.Response(status=416, headers=headers, text=f"there are {size} bytes\n")


def whole(
    request: web.Request, body: bytes, content_type: str, control: str, etag: str
) -> web.Response:
    """A small body, with conditions and ranges."""
    headers = caching(control, etag) | {"Content-Type": content_type}
    if etag_matches(request.headers.get("If-None-Match"), etag):
        return web.Response(status=304, headers=headers)
    span = span_of(request, len(body), etag)
    if isinstance(span, web.Response):
        return span
    if span is None:
        return web.Response(body=body, headers=headers)
    headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{len(body)}"
    return web.Response(status=206, body=body[span.start : span.stop], headers=headers)
