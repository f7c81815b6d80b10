"""Globs on the names of store paths: `app-*` is about `/nix/store/<hash>-app-1.0`.

As Python's fnmatch has them: `*`, `?`, `[a-c]`, `[!a-c]`; case counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from narseal.nix.base32 import CHARS

_MAX_LENGTH = 250
_NAME_CHARS = r"0-9a-zA-Z+\-._?="
#: What some name can be matched by; what is in brackets is taken as it is.
_GLOB = re.compile(rf"(?:[{_NAME_CHARS}*]|\[!?\]?[^\]]*\])+", re.ASCII)
_WITH_HASH = re.compile(rf"(?:{CHARS}{{32}}|\?{{32}})-", re.ASCII)


def check_name_glob(text: str) -> str:
    """A glob that some name of a store path matches; ValueError says what to write instead."""
    if "/" in text:
        raise ValueError(
            f"{text[:100]!r} matches no name: names have no slash; of"
            " /nix/store/<hash>-app-1.0 the name is app-1.0"
        )
    if _WITH_HASH.match(text):
        raise ValueError(
            f"{text[:100]!r} begins with a hash, which is no part of a name: leave it out"
        )
    if "," in text or " " in text:
        raise ValueError(f'{text[:100]!r} matches no name: give several globs as ["a-*", "b-*"]')
    if not _GLOB.fullmatch(text) or len(text) > _MAX_LENGTH:
        raise ValueError(
            f"{text[:100]!r} matches no name: names have letters, digits and + - . _ ? =,"
            " and globs * ? [a-c] too"
        )
    return text


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether one of the globs matches a name."""
    return any(fnmatchcase(name, glob) for glob in globs)


def covers(wide: Iterable[str], narrow: Iterable[str]) -> bool:
    """Whether each name that `narrow` matches is plainly matched by `wide`, too.

    False where it is not plain: what has brackets is covered by its equals and by `*` alone, and
    what has `?` or brackets covers its equals alone.
    """
    plain = [glob for glob in wide if "?" not in glob and "[" not in glob]
    equal = frozenset(wide)

    def is_covered(glob: str) -> bool:
        # `*` and `?` stand for themselves: only a `*` matches them, which matches what they do
        return glob in equal or "*" in equal or ("[" not in glob and matches(glob, plain))

    return all(map(is_covered, narrow))
