"""How good the free choice of router and controller is: against every fixed setting, known in hindsight, and
against plain decoding, over cells of (target, task, concurrency)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from cluster.simulator.replay import Fixed, ReplayResult, ReplaySettings, replay
from cluster.simulator.trace import Trace

BEST_FIXED_BOUND, PLAIN_BOUND = 0.95, 0.97


@dataclass(frozen=True, slots=True)
class Cell:
    """Of one target, task and concurrency. `fixed` holds tokens/s of every fixed setting, plain among them,
    the best first. `scale` is the factor on the target's costs."""

    target: str
    task: str
    concurrency: int
    scale: float
    free: ReplayResult
    fixed: tuple[tuple[Fixed, float], ...]

    @property
    def plain(self) -> float:
        return next(speed for setting, speed in self.fixed if not setting.length)

    @property
    def best(self) -> Fixed:
        return self.fixed[0][0]

    @property
    def to_best(self) -> float:
        return self.free.tokens_per_s / self.fixed[0][1]

    @property
    def to_plain(self) -> float:
        return self.free.tokens_per_s / self.plain

    @property
    def holds(self) -> bool:
        return self.to_best >= BEST_FIXED_BOUND and self.to_plain >= PLAIN_BOUND

    @property
    def name(self) -> str:
        """Target with its scale."""
        return self.target if self.scale == 1.0 else f"{self.target} x{self.scale:g}"


def measure_cells(
    traces: Sequence[Trace],
    settings: ReplaySettings,
    scales: Sequence[float] = (1.0,),
    say: Callable[[Cell], None] = lambda cell: None,
) -> list[Cell]:
    """Every cell of every trace and scale; `say` gets each as it is done."""
    cells: list[Cell] = []
    for trace in traces:
        for scale in scales:
            scaled = settings.model_copy(update={"scale": scale})
            for task in trace.tasks:
                for concurrency in settings.concurrency:
                    cell = measure_cell(trace, task, concurrency, scaled)
                    cells.append(cell)
                    say(cell)
    return cells


def measure_cell(trace: Trace, task: str, concurrency: int, settings: ReplaySettings) -> Cell:
    lengths = [k for k in settings.lengths if k <= trace.card.chain]
    fixed = [Fixed(), *(Fixed(e, k) for e in trace.card.exits for k in lengths)]
    speeds = [(f, replay(trace, task, concurrency, f, settings).tokens_per_s) for f in fixed]
    return Cell(
        trace.card.target,
        task,
        concurrency,
        settings.scale,
        replay(trace, task, concurrency, None, settings),
        tuple(sorted(speeds, key=lambda pair: -pair[1])),
    )


def summary(cells: Sequence[Cell]) -> dict[str, float | int]:
    """Over all cells; raises ValueError without any."""
    if not cells:
        raise ValueError("cells: there are none")
    return {
        "cells": len(cells),
        "held": sum(cell.holds for cell in cells),
        "lowest_to_best": min(cell.to_best for cell in cells),
        "mean_to_best": fmean(cell.to_best for cell in cells),
        "lowest_to_plain": min(cell.to_plain for cell in cells),
        "mean_to_plain": fmean(cell.to_plain for cell in cells),
        "best_is_plain": sum(not cell.best.length for cell in cells),
    }
