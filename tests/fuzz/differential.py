"""Narinfos near a good one, read by narseal and by real Nix."""

from __future__ import annotations

import random
import time

from narseal.errors import NarsealError
from narseal.nix.narinfo import NarInfo
from tests.fuzz.mutation import mutated
from tests.tools.differential import ITEM, read_by_nix
from tests.tools.nix import nix

_BATCH = 100


def fuzz_narinfos(seconds: float) -> tuple[int, list[bytes]]:
    """How many texts both read, and those that narseal takes for another path than Nix does."""
    choice = random.Random()
    seeds = (ITEM.info.render(),)
    findings: list[bytes] = []
    tried = 0
    deadline = time.monotonic() + seconds
    with nix() as client:
        while not tried or time.monotonic() < deadline:
            texts = accepted(choice, seeds)
            infos = [NarInfo.parse(text) for text in texts]
            by_nix = read_by_nix(client, texts)
            ours = read_by_nix(client, [info.render() for info in infos])
            for text, theirs, mine in zip(texts, by_nix, ours, strict=True):
                findings += [] if agrees(theirs, mine) else [text]
            tried += len(texts)
    return tried, findings


def accepted(choice: random.Random, seeds: tuple[bytes, ...]) -> list[bytes]:
    """Texts that narseal takes for a narinfo of the good one's path."""
    found: list[bytes] = []
    while len(found) < _BATCH:
        text = mutated(choice, seeds)
        try:
            info = NarInfo.parse(text)
        except NarsealError:
            continue
        if info.store_path == ITEM.info.store_path and text not in seeds:
            found.append(text)
    return found


def agrees(theirs: dict[str, object] | None, mine: dict[str, object] | None) -> bool:
    """Whether what narseal renders is what Nix reads; what Nix refuses, narseal may clean."""
    if mine is None:
        return False
    if theirs is None:
        return True
    signatures, kept = theirs.pop("signatures", []), mine.pop("signatures", [])
    assert isinstance(signatures, list)
    assert isinstance(kept, list)
    # a malformed Sig is dropped here; Nix keeps what it cannot read
    return theirs == mine and set(kept) <= set(signatures)
