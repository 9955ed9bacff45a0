"""Measurements as tables of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.bench.load_summary import LoadPlainRow, LoadRow
from cluster.bench.metrics import Acceptance, Percentiles
from cluster.bench.paired import Comparison
from cluster.bench.profile import PARTS, PROCESSES, ProfileRow
from cluster.bench.spec_bench import OVERALL, Equality, PlainRow, SpecRow
from cluster.reporting.table import Table


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _ms(percentiles: Percentiles | None) -> str:
    if percentiles is None:
        return "-"
    return " / ".join(f"{p * 1e3:.1f}" for p in (percentiles.p50, percentiles.p90, percentiles.p99))


def comparison_text(comparison: Comparison | None) -> str:
    """Median, 95 % interval, pairs and verdict, for example "1.42 [1.31, 1.55], n=20, above 1"."""
    if comparison is None:
        return "-"
    low, high = comparison.low, comparison.high
    interval = "no interval" if low is None or high is None else f"[{low:.2f}, {high:.2f}]"
    verdict = f"{comparison.verdict} {comparison.threshold:g}" if comparison.resolved else "not resolved"
    return f"{comparison.median:.2f} {interval}, n={comparison.pairs}, {verdict}"


def _against(baseline: str, engine: str, comparison: Comparison | None) -> str:
    return "baseline" if engine == baseline else comparison_text(comparison)


def spec_tables(rows: Sequence[SpecRow], baseline: str) -> list[Table]:
    """One table over all tasks, one of speed-ups by task, one of acceptance."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    engines = list(dict.fromkeys(row.engine for row in rows))
    of = {(row.engine, row.task): row for row in rows}
    overall = tuple(_overall_cells(of[engine, OVERALL], baseline) for engine in engines)
    by_task = tuple(
        (engine, *(_cell(of[engine, task]) for task in tasks), _mean_cell(of[engine, OVERALL]))
        for engine in engines
    )
    tables = [
        Table(
            f"All tasks (ratios to {baseline})",
            (
                "engine",
                "tokens/s (mean)",
                "TPOT ms (p50)",
                "paired ratio: median [95 %]",
                "mean accepted tokens",
                "bytes equal",
                "ids equal",
                "errors",
            ),
            overall,
        ),
        Table(
            "By task: tokens/s, speed-up (Spec-Bench's: ratio of means), mean accepted tokens",
            ("engine", *tasks, "mean speed-up of the tasks"),
            by_task,
        ),
        Table(
            f"By task: paired ratio to {baseline}: median [95 %]",
            ("engine", *tasks),
            tuple(
                (engine, *(_against(baseline, engine, of[engine, task].paired) for task in tasks))
                for engine in engines
            ),
        ),
    ]
    acceptance = [_acceptance_cells(e, of[e, OVERALL].acceptance) for e in engines]
    known = tuple(cells for cells in acceptance if cells is not None)
    return [*tables, _acceptance_table(known)] if known else tables


def plain_tables(rows: Sequence[PlainRow]) -> list[Table]:
    """Whether speculation pays within an engine, and whether it changes answers."""
    if not rows:
        return []
    columns = ("engine", "against", "paired ratio: median [95 %]", "bytes equal", "ids equal")
    cells = tuple(
        (row.engine, row.plain, comparison_text(row.paired), *_equality_cells(row.equality)) for row in rows
    )
    return [Table("Speculation against plain decoding of the same engine", columns, cells)]


def _equality_cells(same: Equality | None) -> tuple[str, str]:
    if same is None:
        return "baseline", "baseline"
    return f"{same.bytes_equal} of {same.compared}", f"{same.ids_equal} of {same.ids_compared}"


def _overall_cells(row: SpecRow, baseline: str) -> tuple[str, ...]:
    return (
        row.engine,
        _number(row.tokens_per_s, 1),
        _number(row.tpot_ms),
        _against(baseline, row.engine, row.paired),
        _number(row.mean_accepted_tokens),
        *_equality_cells(row.equality),
        f"{row.errors} of {row.requests}",
    )


def _cell(row: SpecRow) -> str:
    return f"{_number(row.tokens_per_s, 1)}, {_number(row.speedup)}x, {_number(row.mean_accepted_tokens)}"


def _mean_cell(row: SpecRow) -> str:
    return f"{_number(row.speedup)}x"


def _acceptance_cells(engine: str, acceptance: Acceptance | None) -> tuple[str, ...] | None:
    if acceptance is None or not acceptance.drafted:
        return None
    by_exit = ", ".join(f"{name} {rate:.2f}" for name, rate in acceptance.by_exit.items())
    positions = ", ".join(f"{share:.2f}" for share in acceptance.by_position)
    return (
        engine,
        f"{acceptance.accepted} / {acceptance.drafted}",
        _number(acceptance.rate),
        _number(acceptance.mean_accepted_tokens),
        positions or "-",
        by_exit or "-",
    )


def _acceptance_table(rows: tuple[tuple[str, ...], ...]) -> Table:
    columns = (
        "engine", "accepted / drafted", "acceptance rate", "mean accepted tokens",
        "rounds that accepted position 1, 2, ...", "rate by drafter or exit",
    )  # fmt: skip
    return Table("Acceptance", columns, rows)


def load_tables(rows: Sequence[LoadRow], baseline: str) -> list[Table]:
    """One table a point."""
    tables = []
    for point in dict.fromkeys(row.point for row in rows):
        here = [row for row in rows if row.point == point]
        cells = tuple(
            (
                row.engine,
                f"{row.latency.output_tokens_per_s:.1f}",
                _against(baseline, row.engine, row.paired),
                _ms(row.latency.ttft),
                _ms(row.latency.tpot),
                _ms(row.latency.e2e),
                f"{row.latency.requests_per_s:.2f}",
                f"{row.latency.goodput:.2f}",
                _number(row.acceptance.mean_accepted_tokens if row.acceptance else None),
                f"{row.latency.errors} of {row.latency.requests}",
            )
            for row in here
        )
        columns = (
            "engine", "output tokens/s", f"ratio to {baseline}: median [95 %]", "TTFT ms p50 / p90 / p99",
            "TPOT ms p50 / p90 / p99", "end to end ms p50 / p90 / p99", "requests/s", "goodput requests/s",
            "mean accepted tokens", "errors",
        )  # fmt: skip
        tables.append(Table(point.label, columns, cells))
    return tables


def load_plain_tables(rows: Sequence[LoadPlainRow]) -> list[Table]:
    """Whether speculation pays within an engine, by how many requests run at once."""
    if not rows:
        return []
    columns = (
        "engine", "against", "load", "pairs", "output tokens/s: median [95 %]", "mean end to end",
        "mean TTFT", "mean TPOT",
    )  # fmt: skip
    cells = tuple(
        (
            row.engine,
            row.plain,
            row.point.label,
            str(row.paired.pairs),
            comparison_text(row.paired),
            *map(comparison_text, (row.e2e, row.ttft, row.tpot)),
        )
        for row in rows
    )
    title = "Speculation against plain decoding of the same engine: ratios within pairs, above 1 is faster"
    return [Table(title, columns, cells)]


def profile_tables(rows: Sequence[ProfileRow]) -> list[Table]:
    """Milliseconds a round: the engine thread by part, and processor time by process."""
    wall = Table(
        "Engine thread, ms a round",
        ("engine", "concurrency", "tokens/s", "tokens a round", "round", *PARTS),
        tuple((*_profile_head(row), *_per_round(row, row.parts, PARTS)) for row in rows),
    )
    cpu = Table(
        "Processor time, ms a round",
        ("engine", "concurrency", "tokens/s", "tokens a round", "round", *PROCESSES),
        tuple((*_profile_head(row), *_per_round(row, row.cpu, PROCESSES)) for row in rows),
    )
    return [wall, cpu]


def _profile_head(row: ProfileRow) -> tuple[str, ...]:
    rounds = max(1, row.rounds)
    return (
        row.engine,
        str(row.concurrency),
        _number(row.tokens / row.wall_s, 1),
        _number(row.tokens / rounds),
        _number(1e3 * row.wall_s / rounds),
    )


def _per_round(row: ProfileRow, seconds: Mapping[str, float], names: Sequence[str]) -> list[str]:
    return [_number(1e3 * seconds[name] / max(1, row.rounds)) for name in names]
