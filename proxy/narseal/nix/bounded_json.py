"""JSON from outside: its nesting and the number of its values are bounded.

`json.loads` needs 20 to 30 bytes of memory for each byte of `[[],[],…`, and lets nobody else run
until it is done. So a large text that may have many values is first read as a stream of events, which
takes no memory; a small one cannot have too many.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

import ijson
from pydantic_core import from_json, to_json

from narseal.errors import Malformed

#: An object or array within another, and so on.
MAX_DEPTH = 100
#: Scalars, objects and arrays; a tree of so many takes some 40 MiB and 80 ms.
MAX_VALUES = 400_000
_FEW = 32_000  # values of a large text whose tree can do no harm, whatever it is
_BRIEF = 4 << 10  # bytes of a text in which brackets are counted
_BLOCK = 1 << 20  # bytes that are read at a time
_PORTION = 64 << 10  # bytes that are parsed at a time, the interpreter's lock being held
_MAX_TOKEN = 4 << 20  # bytes of one text or number: it is copied with each portion

_OTHER = object()  # no tree: one may be None


def load_json(data: bytes, *, what: str) -> Any:
    """Any JSON value of at most MAX_DEPTH and MAX_VALUES; Malformed names `what` if it is none.

    It is held to RFC 8259, and a name stands once in an object: which of two counts, readers differ.
    """
    try:
        is_large = len(data) > 2 * MAX_VALUES  # else it cannot have more
        # each value is the first, or behind a comma or an opening bracket
        if is_large and sum(map(data.count, (b"[", b"{", b","))) >= _FEW:
            check_shape(io.BytesIO(data), what=what, depth=MAX_DEPTH, values=MAX_VALUES)
            return _DECODER.decode(data.decode())
        tree = _OTHER if is_large else _compact(data)
        if tree is _OTHER:
            tree = _DECODER.decode(data.decode())
        # of much text, counting takes longer than looking
        if len(data) > _BRIEF or data.count(b"[") + data.count(b"{") > MAX_DEPTH:
            _check_depth(tree, what)
        return tree
    except RecursionError as error:
        raise Malformed(f"{what} nests deeper than {MAX_DEPTH}") from error
    except ValueError as error:
        if isinstance(error, Malformed):
            raise
        raise Malformed(f"{what} is not JSON: {error}") from error


def _compact(data: bytes) -> Any:
    """A value that a program wrote, without blanks and needless escapes; _OTHER of any other text.

    The parser is three times as fast as Python's and passes over names that stand twice: none does
    where the tree, written again, is the same text.
    """
    try:
        tree = from_json(data, allow_inf_nan=False, cache_strings="keys")
    except ValueError:  # the other parser says it better
        return _OTHER
    return tree if to_json(tree) == data else _OTHER


def _check_depth(tree: Any, what: str) -> None:
    """Malformed if it nests too deep: what is done with it may be recursive."""
    level = [tree]
    for _ in range(MAX_DEPTH):
        level = [
            value
            for container in level
            for value in (container.values() if type(container) is dict else container)
            if type(value) is dict or type(value) is list
        ]
        if not level:
            return
    raise Malformed(f"{what} nests deeper than {MAX_DEPTH}")


def check_shape(file: BinaryIO, *, what: str, depth: int, values: int) -> dict[str, object]:
    """Read one JSON value to its end, in bounded memory; the scalars of its outermost object.

    Objects and arrays in it stand as `{}` and `[]`. Malformed if it is not JSON (RFC 8259), nests
    deeper than `depth`, or has more than `values` values.
    """
    outermost: dict[str, object] = {}
    name = ""
    level = count = 0
    try:
        for event, value in _events(file, what):
            if event == "map_key":
                if level == 1:
                    name = str(value)
                continue
            if event in ("end_map", "end_array"):
                level -= 1
                continue
            count += 1
            if level == 1:
                outermost[name] = {"start_map": {}, "start_array": []}.get(event, value)
            if event in ("start_map", "start_array"):
                level += 1
            if level > depth or count > values:
                raise Malformed(f"{what} nests deeper than {depth} or has over {values} values")
    except (ijson.JSONError, UnicodeDecodeError) as error:
        raise Malformed(f"{what} is not JSON: {' '.join(str(error).split())[:200]}") from error
    return outermost


def _events(file: BinaryIO, what: str) -> Iterator[tuple[str, Any]]:
    """What ijson finds, portion by portion: between two of them, other threads have their turn.

    A read lets go of the interpreter's lock only to take it again, and whoever waits for it begins
    anew: so there are few reads.
    """
    events = ijson.sendable_list()
    parser = ijson.basic_parse_coro(events, use_float=True)
    silent = 0  # bytes since the last event
    while block := file.read(_BLOCK):
        for at in range(0, len(block), _PORTION):
            parser.send(block[at : at + _PORTION])
            silent = 0 if events else silent + _PORTION
            if silent > _MAX_TOKEN:
                raise Malformed(f"{what} has a text, number or gap of over {_MAX_TOKEN >> 20} MiB")
            yield from events
            events.clear()
    parser.close()  # it says whether that was all
    yield from events


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise ValueError("a field stands twice")
    return tree


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_number)
