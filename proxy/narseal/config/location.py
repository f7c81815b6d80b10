"""Where in a TOML text an error of the configuration stands."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import takewhile

from pydantic import ValidationError


def sentences(
    error: ValidationError, text: str, source: str, variables: Mapping[str, str] | None = None
) -> list[str]:
    """One sentence for each error: source and line, or the environment's variable; key, reason.

    `variables` are the environment's, by their settings (`limits__nar_size`).
    """
    found = []
    for item in error.errors(include_url=False):
        loc = list(item["loc"])
        line = find_line(text, loc)
        where = f"{source}, line {line}" if line else source
        names = [str(part) for part in takewhile(lambda part: isinstance(part, str), loc)]
        for length in range(1, len(names) + 1):
            where = (variables or {}).get("__".join(names[:length]), where)
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "there is no such setting"
        found.append(f"{where}: {_dotted(loc)}: {message}" if loc else f"{where}: {message}")
    return found


def _dotted(loc: list[str | int]) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc).lstrip(".")


def find_line(text: str, loc: list[str | int]) -> int | None:
    """The line (from 1) of a TOML text where the key at `loc` stands, or the table that misses it."""
    tables = [p for p in loc if isinstance(p, str)]
    index = next((p for p in loc if isinstance(p, int)), 0)
    current: list[str] = []
    seen: dict[str, int] = {}
    best: int | None = None
    for number, line in enumerate(text.split("\n"), 1):
        header = re.match(r"\s*\[\[?\s*([\w.\s\"-]+?)\s*\]\]?", line)
        key = re.match(r"\s*([\w-]+)\s*=", line)
        if header:
            name = header[1]
            current = name.split(".")
            seen[name] = seen.get(name, -1) + 1
        if current == tables[: len(current)] and seen.get(".".join(current), 0) == (
            index if current else 0
        ):
            if header:
                best = number
            elif key and [*current, key[1]] == tables[: len(current) + 1]:
                return number
    return best
