"""What was measured of narseal and of what is beside it, in turns, and the processor time it took."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from tests.bench.servers import cpu_seconds, median
from tests.bench.table import Row


class Sides:
    """Values of each side, by its name and by what was measured."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._cpu: dict[tuple[str, str], list[float]] = defaultdict(list)

    def take(
        self,
        side: str,
        what: str,
        measure: Callable[[], float],
        pid: int | None = None,
        items: int = 1,
    ) -> None:
        """Measure once more; `pid` is the server's, which does so many items meanwhile."""
        before = cpu_seconds(pid) if pid else 0.0
        self._values[side, what].append(measure())
        if pid:
            self._cpu[side, what].append((cpu_seconds(pid) - before) / items * 1000)

    def rows(
        self, label: str, what: str, besides: dict[str, str], form: str, tail: str = ""
    ) -> list[Row]:
        """narseal's median beside that of each other side (with its aim) that was measured."""
        rows = []
        for beside, aim in besides.items():
            if (beside, what) in self._values:
                ours, theirs = (median(self._values[side, what]) for side in ("narseal", beside))
                text = f"{label}{self._each('narseal', what)}, against {beside}{self._each(beside, what)}{tail}"
                ratio = ours / theirs if theirs else None
                rows.append(Row(text, form.format(ours), form.format(theirs), ratio, aim))
        return rows

    def row(self, label: str, what: str, aim: str, form: str) -> Row:
        """narseal's median by itself."""
        text = f"{label}{self._each('narseal', what)}"
        return Row(text, form.format(median(self._values["narseal", what])), "", None, aim)

    def _each(self, side: str, what: str) -> str:
        """Processor time an item, where it is known."""
        spent = self._cpu.get((side, what))
        return f" ({median(spent):.2f} ms CPU each)" if spent else ""
