"""`make bench`: narseal beside nginx in one run on this machine, as ratios; with NCPS and HARMONIA beside them, too.

Prints a Markdown table (docs/benchmarks.md holds one) and exits 1 if an aim is missed by far.
Names on the command line choose: narinfo, cold, crowd, herd, isolation, storage, relay, copy, distance, upload, memory, growth, cosign, custody,
reader, zstd.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from tests.bench import (
    cold,
    copying,
    cosigning,
    crowd,
    custody,
    distance,
    growth,
    memory,
    narinfo,
    nars,
    reader,
    uploading,
)
from tests.bench.table import Row, render


def _zstd() -> list[Row]:
    from tests.bench import zstd  # its library is of a dependency group that only benchmarks have

    return zstd.measure()


SUITES: dict[str, Callable[[], list[Row]]] = {
    "narinfo": narinfo.measure,
    "cold": cold.measure,
    "crowd": crowd.measure,
    "herd": cold.measure_herd,
    "isolation": cold.measure_isolation,
    "storage": nars.measure_storage,
    "relay": nars.measure_relay,
    "copy": copying.measure,
    "distance": distance.measure,
    "upload": uploading.measure,
    "memory": memory.measure,
    "growth": growth.measure,
    "cosign": cosigning.measure,
    "custody": custody.measure,
    "reader": reader.measure,
    "zstd": _zstd,
}


def main() -> None:
    """Run the suites one after another, so that none disturbs another."""
    rows = []
    for name in sys.argv[1:] or SUITES:
        print(f"measuring {name} …", file=sys.stderr, flush=True)
        measured = SUITES[name]()
        print(*measured, sep="\n", file=sys.stderr, flush=True)
        rows += measured
    print(render(rows))


if __name__ == "__main__":
    main()
