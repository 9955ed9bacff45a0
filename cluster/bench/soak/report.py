"""Memory over requests as tables and a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.bench.soak.memory import MEASURES, MIB, ROLES, TOTAL, Growth, MemorySample
from cluster.reporting.plot import COLORS, pyplot_module, save
from cluster.reporting.table import Table


@dataclass(slots=True)
class SoakResults:
    """failures: message of each request that failed. untouched_kv_blocks: of the KV pool after the warm-up;
    the operating system gives their memory when they are first used. duration_s: first request to last."""

    requests: int
    kinds: dict[str, int] = field(default_factory=dict)
    samples: list[MemorySample] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    ended: int = 0
    untouched_kv_blocks: int | None = None
    duration_s: float = 0.0


def soak_tables(results: SoakResults, grown: Sequence[Growth], limit: float) -> list[Table]:
    tables = [_growth_table(results, grown, limit)] if grown else []
    rows = tuple((kind, str(count)) for kind, count in results.kinds.items())
    tables.append(
        Table(f"Requests: {results.ended} ended in {results.duration_s:.0f} s", ("kind", "count"), rows)
    )
    failed = tuple((text, str(count)) for text, count in Counter(results.failures).most_common(10))
    if failed:
        tables.append(Table(f"Failures: {len(results.failures)}", ("message", "count"), failed))
    return tables


def _growth_table(results: SoakResults, grown: Sequence[Growth], limit: float) -> Table:
    processes = results.samples[-1].by_role
    rows = tuple(
        (
            role,
            str(processes[role]["processes"]),
            *(cell for measure in MEASURES for cell in _cells(grown, role, measure)),
        )
        for role in (*ROLES, TOTAL)
    )
    columns = ["role", "processes at the end"]
    for name in map(str.upper, MEASURES):
        columns += [
            f"{name} after warm-up, MiB",
            f"{name} at the end, MiB",
            f"{name} growth",
            f"{name} MiB / 1000 requests",
        ]
    title = f"Memory over {results.requests} requests; flat is a growth of the total of at most {limit:g} %"
    return Table(title, tuple(columns), rows)


def _cells(grown: Sequence[Growth], role: str, measure: str) -> tuple[str, ...]:
    found = next(g for g in grown if (g.role, g.measure) == (role, measure))
    return (
        f"{found.before / MIB:.1f}",
        f"{found.after / MIB:.1f}",
        f"{found.percent:+.2f} %",
        f"{found.mib_per_1000:+.2f}",
    )


def plot_soak(results: SoakResults, path: Path) -> None:
    """PSS against requests: the total, and each role's change since the end of the warm-up."""
    plt = pyplot_module()
    figure, (whole, change) = plt.subplots(1, 2, figsize=(12, 4.5))
    xs = [s.requests for s in results.samples]
    first = next((s for s in results.samples if s.requests >= results.requests / 10), results.samples[0])
    for measure, style in zip(MEASURES, ("-", "--"), strict=True):
        values = [s.by_role[TOTAL][measure] / MIB for s in results.samples]
        whole.plot(xs, values, style, color=COLORS[0], label=f"total {measure.upper()}")
    for index, role in enumerate((*ROLES, TOTAL)):
        values = [(s.by_role[role]["pss"] - first.by_role[role]["pss"]) / MIB for s in results.samples]
        style = "-" if index < len(COLORS) else "--"
        change.plot(xs, values, style, color=COLORS[index % len(COLORS)], label=role)
    whole.set(xlabel="requests ended", ylabel="MiB")
    whole.set_ylim(bottom=0)
    change.set(xlabel="requests ended", ylabel="PSS since the end of the warm-up, MiB")
    for axis in (whole, change):
        axis.axvline(results.requests / 10, color="black", linewidth=0.8, linestyle=":")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save(plt, figure, path)
