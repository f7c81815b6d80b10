"""Globs on names: what is said to cover another does, and what is taken can match."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from narseal.nix.name_globs import check_name_glob, covers, matches

PIECES = st.sampled_from(["a", "b", "*", "?", "[ab]", "[!a]", "-"])
GLOBS = st.lists(PIECES, min_size=1, max_size=5).map("".join)
NAMES = st.text("abc-", min_size=1, max_size=6)


@given(st.lists(GLOBS, max_size=3), st.lists(GLOBS, min_size=1, max_size=3), st.lists(NAMES))
def test_no_name_escapes_what_covers(wide: list[str], narrow: list[str], names: list[str]) -> None:
    if covers(wide, narrow):
        assert all(matches(name, wide) for name in names if matches(name, narrow))


@given(st.lists(GLOBS, min_size=1, max_size=3))
def test_everything_covers_all_and_each_itself(globs: list[str]) -> None:
    assert covers(["*"], globs)
    assert covers(globs, globs)


@given(st.text("ab*?[]!-", max_size=6), st.text("abc-+._?=", min_size=1, max_size=6))
def test_what_is_refused_matches_no_name(glob: str, name: str) -> None:
    try:
        check_name_glob(glob)
    except ValueError:
        assert not matches(name, [glob])
