"""Starts as tables and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.bench.start.phases import PHASES
from cluster.reporting.plot import COLORS, pyplot_module, save
from cluster.reporting.table import Table


@dataclass(frozen=True, slots=True)
class Start:
    """phases: seconds, see `split_start`. printed: what `s2d serve` said of its own phases, which overlap."""

    phases: dict[str, float]
    printed: dict[str, float]

    @property
    def total_s(self) -> float:
        return sum(self.phases.values())


def start_tables(starts: Sequence[Start]) -> list[Table]:
    rows = [(name, *_cells([s.phases[name] for s in starts])) for name in PHASES]
    rows.append(("process start to first token", *_cells([s.total_s for s in starts])))
    names = dict.fromkeys(name for s in starts for name in s.printed)
    printed = [(name, *_cells([s.printed[name] for s in starts if name in s.printed])) for name in names]
    columns = ("phase", "median, s", "range, s")
    return [
        Table(f"Start by phase, one after the other, {len(starts)} starts", columns, tuple(rows)),
        Table("As `s2d serve` prints it (deployments side by side)", columns, tuple(printed)),
    ]


def _cells(seconds: Sequence[float]) -> tuple[str, str]:
    return f"{statistics.median(seconds):.2f}", f"{min(seconds):.2f} - {max(seconds):.2f}"


def plot_starts(starts: Sequence[Start], path: Path) -> None:
    """A stacked bar a start."""
    plt = pyplot_module()
    figure, axis = plt.subplots(figsize=(11, 2.4 + 0.5 * len(starts)))
    names = [f"start {i + 1}" for i in range(len(starts))]
    left = [0.0] * len(starts)
    for index, phase in enumerate(PHASES):
        widths = [s.phases[phase] for s in starts]
        hatch = "//" if index >= len(COLORS) else None
        axis.barh(names, widths, left=left, color=COLORS[index % len(COLORS)], hatch=hatch, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("seconds after `s2d serve`")
    axis.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    save(plt, figure, path)
