"""Pictures of measurements that people compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.bench.load_summary import LoadRow
from cluster.bench.profile import PARTS, PROCESSES, ProfileRow
from cluster.bench.spec_bench import SpecRow
from cluster.reporting.plot import COLORS, pyplot_module, save


def plot_speedups(rows: Sequence[SpecRow], baseline: str, path: Path) -> None:
    """Bars of the speed-up by task, one colour an engine; whiskers are the 95 % interval of the paired
    median where there is one. Bars are paired medians, for all tasks together too."""
    plt = pyplot_module()
    tasks = list(dict.fromkeys(row.task for row in rows))
    engines = [e for e in dict.fromkeys(row.engine for row in rows) if e != baseline]
    of = {(row.engine, row.task): row.paired for row in rows}
    figure, axis = plt.subplots(figsize=(max(7.0, 1.6 * len(tasks)), 4.5))
    width = 0.8 / max(1, len(engines))
    for index, engine in enumerate(engines):
        for place, task in enumerate(tasks):
            paired = of.get((engine, task))
            if paired is None:
                continue
            bound = None
            if paired.low is not None and paired.high is not None:
                bound = [[paired.median - paired.low], [paired.high - paired.median]]
            axis.bar(
                place + (index - (len(engines) - 1) / 2) * width,
                paired.median,
                width * 0.95,
                yerr=bound,
                capsize=2,
                color=COLORS[index % len(COLORS)],
                label=engine if place == 0 else None,
            )
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(tasks)), tasks, rotation=20, ha="right")
    axis.set_ylabel(f"speed over {baseline}")
    if engines:
        axis.legend(fontsize=8)
    save(plt, figure, path)


def plot_load(rows: Sequence[LoadRow], path: Path) -> None:
    """Output tokens/s and TPOT (median, and up to p90) against concurrency, and likewise against the arrival
    rate where there is one."""
    plt = pyplot_module()
    closed = [row for row in rows if row.point.concurrency is not None]
    opened = [row for row in rows if row.point.rate is not None]
    panels = [(r, x) for r, x in ((closed, "concurrency"), (opened, "arrivals, requests/s")) if r]
    figure, axes = plt.subplots(len(panels) or 1, 2, figsize=(11, 4 * (len(panels) or 1)), squeeze=False)
    for (throughput, latency), (shown, label) in zip(axes, panels, strict=False):
        for index, engine in enumerate(dict.fromkeys(row.engine for row in shown)):
            mine = [row for row in shown if row.engine == engine]
            color = COLORS[index % len(COLORS)]
            xs = [row.point.concurrency or row.point.rate for row in mine]
            speeds = [row.latency.output_tokens_per_s for row in mine]
            throughput.plot(xs, speeds, "o-", color=color, label=engine)
            known = [(x, row.latency.tpot) for x, row in zip(xs, mine, strict=True) if row.latency.tpot]
            at = [x for x, _ in known]
            latency.plot(at, [t.p50 * 1e3 for _, t in known], "o-", color=color, label=engine)
            bounds = ([t.p50 * 1e3 for _, t in known], [t.p90 * 1e3 for _, t in known])
            latency.fill_between(at, *bounds, color=color, alpha=0.15)
        throughput.set_ylabel("output tokens/s")
        latency.set_ylabel("TPOT, ms (p50 to p90)")
        for axis in (throughput, latency):
            axis.set_xlabel(label)
            axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
            if label == "concurrency":
                axis.set_xscale("log", base=2)
                ticks = sorted({row.point.concurrency for row in shown if row.point.concurrency})
                axis.set_xticks(ticks, [str(tick) for tick in ticks])
    save(plt, figure, path)


def plot_profile(rows: Sequence[ProfileRow], path: Path) -> None:
    """Stacked bars, one a configuration and concurrency: ms a round of the engine thread by part, and of
    processor time by process."""
    plt = pyplot_module()
    figure, axes = plt.subplots(1, 2, figsize=(13, 1.5 + 0.6 * len(rows)), squeeze=False)
    names = [f"{row.engine}, {row.concurrency} at once" for row in rows]
    panels = (("engine thread", PARTS, "parts"), ("processor time", PROCESSES, "cpu"))
    for axis, (title, kinds, attribute) in zip(axes[0], panels, strict=True):
        left = [0.0] * len(rows)
        for index, kind in enumerate(kinds):
            widths = [1e3 * getattr(row, attribute)[kind] / max(1, row.rounds) for row in rows]
            axis.barh(names, widths, left=left, color=COLORS[index % len(COLORS)], label=kind)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.invert_yaxis()
        axis.set_xlabel("ms a round")
        axis.set_title(title)
        axis.legend(fontsize=8)
    save(plt, figure, path)


def plot_ratios(groups: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Bars of the median speed over plain decoding, with the range over pairs; one panel a group."""
    plt = pyplot_module()
    figure, axes = plt.subplots(1, len(groups), figsize=(6 * len(groups), 4), squeeze=False)
    for axis, (title, rows) in zip(axes[0], groups.items(), strict=True):
        names = [row["arm"] for row in rows]
        medians = [row["ratio_to_plain"] for row in rows]
        below = [row["ratio_to_plain"] - row["ratio_min"] for row in rows]
        above = [row["ratio_max"] - row["ratio_to_plain"] for row in rows]
        axis.bar(range(len(rows)), medians, yerr=[below, above], capsize=4, color="#4477aa")
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(rows)), names, rotation=30, ha="right")
        axis.set_ylabel("speed over plain decoding")
        axis.set_title(title)
    save(plt, figure, path)
