"""Choice quality as files: JSON, a Markdown table and a heat map."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.reporting.table import Table
from cluster.simulator.choice_quality import BEST_FIXED_BOUND, PLAIN_BOUND, Cell, summary
from cluster.simulator.replay import ReplaySettings
from cluster.simulator.trace import TraceCard

FORMAT_VERSION = 1


def table(cells: Sequence[Cell]) -> Table:
    return Table(
        "Choice of router and controller, replayed",
        (
            "target", "task", "at once", "plain tokens/s", "best fixed", "best / plain", "free / best",
            "free / plain", "router's last choice", "holds",
        ),
        tuple(
            (
                c.name, c.task, str(c.concurrency), f"{c.plain:.1f}", c.best.name,
                f"{c.fixed[0][1] / c.plain:.3f}", f"{c.to_best:.3f}", f"{c.to_plain:.3f}",
                c.free.assignment, "yes" if c.holds else "**no**",
            )
            for c in cells
        ),
    )  # fmt: skip


def write(
    out: Path, cards: Sequence[TraceCard], settings: ReplaySettings, cells: Sequence[Cell]
) -> dict[str, float | int]:
    """choice.json, choice.md and choice.png in `out`; returns the summary. Raises OSError."""
    out.mkdir(parents=True, exist_ok=True)
    total = summary(cells)
    document = {
        "format": FORMAT_VERSION,
        "settings": settings.model_dump(mode="json"),
        "traces": [card.model_dump(mode="json") for card in cards],
        "bounds": {"best_fixed": BEST_FIXED_BOUND, "plain": PLAIN_BOUND},
        "summary": total,
        "cells": [_cell(cell) for cell in cells],
    }
    (out / "choice.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    lines = [
        "# Choice quality",
        "",
        f"Settings: `{settings.model_dump_json()}`.",
        "",
        *(f"Trace: {c.target}, draft {c.draft}, {c.dataset}, {c.content_hash[:12]}." for c in cards),
        "",
        f"{total['held']} of {total['cells']} cells hold: at least {BEST_FIXED_BOUND} of the best fixed "
        f"setting (lowest {total['lowest_to_best']:.3f}), at least {PLAIN_BOUND} of plain decoding (lowest "
        f"{total['lowest_to_plain']:.3f}). Plain decoding is the best fixed setting in "
        f"{total['best_is_plain']}.",
        "",
        table(cells).markdown(),
    ]
    (out / "choice.md").write_text("\n".join(lines), encoding="utf-8")
    _plot(cells, out / "choice.png")
    return total


def _cell(cell: Cell) -> dict[str, Any]:
    return {
        "target": cell.target,
        "task": cell.task,
        "concurrency": cell.concurrency,
        "scale": cell.scale,
        "free": asdict(cell.free),
        "to_best": cell.to_best,
        "to_plain": cell.to_plain,
        "holds": cell.holds,
        "fixed": [{**asdict(setting), "tokens_per_s": speed} for setting, speed in cell.fixed],
    }


def _plot(cells: Sequence[Cell], path: Path) -> None:
    """Two maps: the free choice over the best fixed setting, and over plain decoding."""
    from cluster.reporting.plot import pyplot_module, save

    plt = pyplot_module()
    columns = list(dict.fromkeys((c.name, c.concurrency) for c in cells))
    tasks = list(dict.fromkeys(c.task for c in cells))
    of = {(c.name, c.concurrency, c.task): c for c in cells}
    size = (2.5 + 0.75 * len(columns), 2.0 + 1.1 * len(tasks))
    figure, axes = plt.subplots(2, 1, figsize=size, squeeze=False)
    panels = (("free choice / best fixed", "to_best"), ("free choice / plain", "to_plain"))
    for axis, (title, attribute) in zip(axes[:, 0], panels, strict=True):
        values = [
            [getattr(of[name, n, task], attribute) if (name, n, task) in of else float("nan")
             for name, n in columns]
            for task in tasks
        ]  # fmt: skip
        axis.imshow(values, cmap="RdYlGn", vmin=0.9, vmax=1.1, aspect="auto")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8)
        axis.set_yticks(range(len(tasks)), tasks)
        axis.set_xticks(
            range(len(columns)),
            [f"{n}, {m} at once" for n, m in columns],
            rotation=35,
            ha="right",
            fontsize=7,
        )
        axis.set_title(title)
    save(plt, figure, path)
