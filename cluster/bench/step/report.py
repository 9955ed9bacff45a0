"""Step times as tables and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.bench.fit import GrowthFit, fit_growth
from cluster.bench.paired import compare_ratios
from cluster.bench.step.agreement import Agreement
from cluster.bench.step.products import ProductTimes
from cluster.bench.step.times import StepTimes
from cluster.bench.tables import comparison_text
from cluster.reporting.plot import COLORS, pyplot_module, save
from cluster.reporting.table import Table

VERIFY_ROWS = 8
LIMITS = {"int8": 1.2}
LIMIT = 1.4
"""Most that a step over `VERIFY_ROWS` rows should cost, in steps over one row."""


@dataclass(slots=True)
class StepResults:
    """What was measured so far."""

    times: list[StepTimes] = field(default_factory=list)
    products: list[ProductTimes] = field(default_factory=list)
    agreement: list[Agreement] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.times or self.products or self.agreement)


def fits(times: StepTimes) -> dict[int, GrowthFit]:
    """Time against context by batch, in seconds; nothing before the first full repeat."""
    found = {}
    for batch in dict.fromkeys(batch for batch, _ in times.contexts_s):
        curves = {c: seconds for (b, c), seconds in times.contexts_s.items() if b == batch}
        repeats = list(zip(*curves.values(), strict=False))
        if repeats:
            found[batch] = fit_growth(list(curves), repeats)
    return found


def step_tables(results: StepResults) -> list[Table]:
    tables = [_rows_table(times) for times in results.times]
    if results.times:
        tables.append(_ratio_table(results.times))
    if any(times.contexts_s for times in results.times):
        tables += [_context_table(times) for times in results.times]
        tables.append(_growth_table(results.times))
    if results.products:
        tables.append(_price_table(results.products))
    if results.agreement:
        tables.append(_agreement_table(results.agreement))
    return tables


def _pair(seconds: Sequence[float]) -> str:
    return f"{min(seconds) * 1e3:.2f} / {statistics.median(seconds) * 1e3:.2f}" if seconds else "-"


def _rows_table(times: StepTimes) -> Table:
    name = f"{times.dtype}: step by rows of one sequence, ms, minimum / median of {_repeats(times)}"
    columns = ("backend", "threads", *(f"{n} rows" if n > 1 else "1 row" for n in times.rows_s))
    backend = f"{times.backend} ({times.isa})"
    return Table(name, columns, ((backend, str(times.threads), *map(_pair, times.rows_s.values())),))


def _repeats(times: StepTimes) -> int:
    return max((len(s) for s in (*times.rows_s.values(), *times.contexts_s.values())), default=0)


def _ratio(above: Sequence[float], below: Sequence[float], threshold: float = 1.0) -> str:
    """Of times of the same repeats: that of the minima, and the median of the repeats' own."""
    found = compare_ratios([a / b for a, b in zip(above, below, strict=False)], threshold)
    return "-" if found is None else f"{min(above) / min(below):.2f} / {comparison_text(found)}"


def _ratio_table(all_times: Sequence[StepTimes]) -> Table:
    rows = tuple(
        (
            times.dtype,
            f"{times.weight_bytes / 1e6:.0f}" if times.weight_bytes else "-",
            _pair(times.floors_s),
            _ratio(times.rows_s.get(1, ()), times.floors_s),
            _ratio(
                times.rows_s.get(VERIFY_ROWS, ()), times.rows_s.get(1, ()), LIMITS.get(times.dtype, LIMIT)
            ),
        )
        for times in all_times
    )
    columns = (
        "dtype", "weights, MB", "read floor, ms", "1 row / floor", f"{VERIFY_ROWS} rows / 1 row",
    )  # fmt: skip
    return Table("Ratios: of the minima / median of the repeats [95 %]", columns, rows)


def _context_table(times: StepTimes) -> Table:
    contexts = list(dict.fromkeys(context for _, context in times.contexts_s))
    rows = tuple(
        (str(batch), *(_pair(times.contexts_s[batch, context]) for context in contexts))
        for batch in dict.fromkeys(batch for batch, _ in times.contexts_s)
    )
    title = f"{times.dtype}: step by context and batch, ms, minimum / median of {_repeats(times)}"
    return Table(title, ("sequences", *map(str, contexts)), rows)


def _growth_table(all_times: Sequence[StepTimes]) -> Table:
    rows = tuple(
        (times.dtype, str(batch), *_growth_cells(fit))
        for times in all_times
        for batch, fit in fits(times).items()
    )
    columns = (
        "dtype", "sequences", "at context 0, ms", "µs a token of context", "worst residual of the line",
        "quadratic share at the greatest context [95 %]", "quadratic term",
    )  # fmt: skip
    return Table("Growth with context: line through the medians, and what a parabola adds", columns, rows)


def _growth_cells(fit: GrowthFit) -> tuple[str, ...]:
    bound = "" if fit.low is None or fit.high is None else f" [{fit.low:+.1%}, {fit.high:+.1%}]"
    return (
        f"{fit.intercept * 1e3:.2f}",
        f"{fit.slope * 1e6:.3f}",
        f"{fit.worst_residual:.1%}",
        f"{fit.share:+.1%}{bound}",
        "resolved" if fit.resolved else "not resolved",
    )


def _price_table(products: Sequence[ProductTimes]) -> Table:
    rows = tuple(
        (
            p.dtype,
            f"{count}",
            _pair(p.native_s[count]),
            _pair(p.torch_s[count]),
            _ratio(p.native_s[count], p.torch_s[count]),
            f"{p.native_changed} / {p.torch_changed} of {p.products}",
        )
        for p in products
        for count in p.native_s
    )
    columns = (
        "dtype", "rows", "native, row-invariant, ms", "torch linear, ms", "native / torch [95 %]",
        "products whose first row changes with the batch: native / torch",
    )  # fmt: skip
    return Table("Price of row-invariance: all products of a step, minimum / median", columns, rows)


def _agreement_table(agreement: Sequence[Agreement]) -> Table:
    rows = tuple(
        (a.dtype, f"{a.same} of {a.tokens} ({a.same / a.tokens:.1%})", f"{a.divergence:.5f}")
        for a in agreement
    )
    columns = ("dtype", "best token equal to float32's", "KL divergence from float32, nats")
    return Table("Agreement with float32, teacher forced on its greedy answers", columns, rows)


def plot_steps(all_times: Sequence[StepTimes], path: Path) -> None:
    """Time against rows, and against context by batch (medians, with the fitted lines), one panel a dtype."""
    plt = pyplot_module()
    with_context = [t for t in all_times if fits(t)]
    panels = 1 + len(with_context)
    columns = min(2, panels)
    lines = -(-panels // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(6 * columns, 4.2 * lines), squeeze=False)
    axes = grid.flatten()
    _plot_rows(axes[0], all_times)
    for axis, times in zip(axes[1:panels], with_context, strict=True):
        _plot_context(axis, times)
    for axis in axes[panels:]:
        axis.axis("off")
    save(plt, figure, path)


def _plot_rows(axis: Any, all_times: Sequence[StepTimes]) -> None:
    for index, times in enumerate(all_times):
        color = COLORS[index % len(COLORS)]
        medians = [1e3 * statistics.median(s) for s in times.rows_s.values()]
        minima = [1e3 * min(s) for s in times.rows_s.values()]
        axis.plot(list(times.rows_s), medians, "o-", color=color, label=times.dtype)
        axis.plot(list(times.rows_s), minima, ":", color=color)
        if times.floors_s:
            axis.axhline(1e3 * min(times.floors_s), color=color, linewidth=0.8, linestyle="--")
    axis.set(
        xlabel="rows of one sequence", ylabel="step, ms", title="median; dotted: minimum; dashed: read floor"
    )
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _plot_context(axis: Any, times: StepTimes) -> None:
    for index, (batch, fit) in enumerate(fits(times).items()):
        color = COLORS[index % len(COLORS)]
        points = {c: 1e3 * statistics.median(s) for (b, c), s in times.contexts_s.items() if b == batch}
        axis.plot(list(points), list(points.values()), "o", color=color, label=f"{batch} at once")
        axis.plot(list(points), [1e3 * (fit.intercept + fit.slope * c) for c in points], "-", color=color)
    axis.set(xlabel="context, tokens", ylabel="step, ms", title=f"{times.dtype}: medians and fitted lines")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
