"""Input near good input, for what libFuzzer cannot drive: sockets and other programs."""

from __future__ import annotations

import random
from collections.abc import Sequence

_CHARACTERS = b'\n\r\0 :,;-=/?%.*azAZ019+\x7f\x80\xff{}[]"'


def mutated(choice: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds with a few changes: bytes, cuts, repeats, pieces of another seed."""
    data = bytearray(choice.choice(seeds))
    for _ in range(choice.randint(1, 4)):
        at = choice.randint(0, len(data))
        size = choice.choice((0, 1, 1, 2, 4, 16))
        kind = choice.randrange(6)
        if kind == 0:
            data[at : at + size] = choice.randbytes(choice.randint(0, 3))
        elif kind == 1:
            data[at : at + size] = bytes(choice.choices(_CHARACTERS, k=choice.randint(0, 3)))
        elif kind == 2:
            del data[at : at + size * 4]
        elif kind == 3:
            data[at:at] = data[at : at + size] * choice.randint(1, 50)
        elif kind == 4:
            other = choice.choice(seeds)
            start = choice.randint(0, len(other))
            data[at:at] = other[start : start + choice.randint(1, 200)]
        elif data:
            data[at % len(data)] ^= 1 << choice.randrange(8)
    return bytes(data)
