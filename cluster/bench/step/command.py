"""`s2d bench step`: every part of the measurement, with progress, then the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cluster.bench.config import StepSettings
from cluster.bench.environment import environment
from cluster.bench.prompts import PROMPTS
from cluster.bench.report import document_of, publish
from cluster.bench.session import progress_bar, saving
from cluster.bench.step.agreement import measure_agreement
from cluster.bench.step.products import measure_products
from cluster.bench.step.report import StepResults, fits, plot_steps, step_tables
from cluster.bench.step.times import StepTimes, measure_steps
from cluster.gateway.sse import to_jsonable
from cluster.reporting.table import Table

_FLOATS = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def measure_step(settings: StepSettings, out: Path) -> None:
    """step.json, step.md and step.png in `out`. An interrupted run writes the repeats that it finished."""
    console = Console(stderr=True)
    machine = environment()
    results = StepResults()

    def write(interrupted: str | None) -> list[Table]:
        return write_step(out, settings, results, machine, interrupted)

    with saving(console, out, write, lambda: bool(results)), progress_bar(console) as bar:

        def counter(name: str, total: int) -> Callable[[], None]:
            task = bar.add_task(name, total=total)
            return lambda: bar.advance(task)

        def say(text: str) -> None:
            console.print(text, markup=False)

        if settings.rows or settings.contexts:
            for dtype in settings.dtypes:
                step = counter(f"steps, {dtype}", settings.repeats)
                measure_steps(dtype, settings, results.times, step, say)
        if settings.row_invariance_price:
            for dtype in settings.dtypes:
                if dtype in _FLOATS:  # torch has no product of the core's int8 weights
                    say(f"products in {dtype}, native and torch")
                    results.products.append(
                        measure_products(settings.source, _FLOATS[dtype], settings.threads, settings.repeats)
                    )
        if settings.agreement:
            precisions = 1 + sum(dtype != "float32" for dtype in settings.dtypes)
            step = counter("agreement", precisions * len(PROMPTS))
            results.agreement += measure_agreement(settings, step, say)


def write_step(
    out: Path,
    settings: StepSettings,
    results: StepResults,
    machine: dict[str, Any],
    interrupted: str | None = None,
) -> list[Table]:
    document = document_of("step", settings, machine, {}, interrupted) | {
        "steps": [_times_json(times) for times in results.times],
        "products": to_jsonable(results.products),
        "agreement": to_jsonable(results.agreement),
    }
    tables = step_tables(results)
    publish(
        out,
        "step",
        "Step times of the engine",
        document,
        tables,
        lambda path: plot_steps(results.times, path),
    )
    return tables


def _times_json(times: StepTimes) -> dict[str, Any]:
    contexts = [
        {"batch": batch, "context": context, "seconds": seconds}
        for (batch, context), seconds in times.contexts_s.items()
    ]
    return {**to_jsonable(times), "contexts_s": contexts, "growth": to_jsonable(fits(times))}
