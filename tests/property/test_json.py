"""JSON is read by two parsers, whichever is quicker: they must say the same of every text."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from narseal.errors import Malformed
from narseal.nix.bounded_json import load_json

_TEXTS = st.text(max_size=6) | st.sampled_from(["a", 'a":', "\\", '"', "\ud800", "/", "\x7f", "—"])
_SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([-0.0, 1e16, 1e-7, 10**25]) | _TEXTS
)  # fmt: skip
_TREES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXTS, inner, max_size=4),
    max_leaves=12,
)
_PIECES = st.sampled_from(
    [b"", b" ", b"\n", b",", b":", b'"a":1,', b'"a":', b"{", b"}", b"[", b"]", b'"', b"\\", b"0",
     b"-", b".", b"e9", b"1e999", b"NaN", b"Infinity", b"\\ud800", b"\\u0061", b"\\/", b"\xff", b"\x00",
     b"\xef\xbb\xbf"]
)  # fmt: skip


def _reference(data: bytes) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("twice")
        return dict(pairs)

    def none(text: str) -> Any:
        raise ValueError(text)

    return json.loads(data.decode(), object_pairs_hook=once, parse_constant=none)


def _said(read: Callable[[bytes], Any], data: bytes) -> str:
    try:
        return repr(read(data))
    except (ValueError, Malformed):
        return "refused"


@given(
    tree=_TREES, ascii_only=st.booleans(), compact=st.booleans(), at=st.integers(0, 200),
    gone=st.integers(0, 3), piece=_PIECES,
)  # fmt: skip
@example(tree={"a": 1}, ascii_only=True, compact=True, at=1, gone=0, piece=b'"a":1,')
@example(tree=[1], ascii_only=True, compact=True, at=1, gone=1, piece=b"1e999")
@example(tree={"a": 1}, ascii_only=True, compact=True, at=5, gone=1, piece=b"NaN")
@example(tree={"a": 1}, ascii_only=True, compact=True, at=7, gone=0, piece=b" ")
def test_both_parsers_say_the_same(
    tree: Any, ascii_only: bool, compact: bool, at: int, gone: int, piece: bytes
) -> None:
    separators = (",", ":") if compact else None
    text = json.dumps(tree, ensure_ascii=ascii_only, separators=separators)
    data = text.encode(errors="surrogatepass")
    for bent in (data, data[:at] + piece + data[at + gone :]):
        assert _said(lambda text: load_json(text, what="it"), bent) == _said(_reference, bent)
