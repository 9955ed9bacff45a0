"""The live check: the free choice of router and controller against the best fixed settings of the replay.

On a running server, cell by cell: blocks of the same requests with the free choice and with each setting
pinned by its requests, one after the other in rotating order. What counts is the ratio of their tokens/s
within a pair.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.drafting.interface import NESTED
from cluster.bench.choice.settings import LiveSettings
from cluster.bench.config import LoadSettings
from cluster.bench.datasets import Question, builtin, read_spec_bench, sample
from cluster.bench.engines.s2d import S2DEngine
from cluster.bench.engines.s2d_server import S2DServer
from cluster.bench.load import Block, run_load
from cluster.bench.paired import Comparison, compare
from cluster.bench.rendering import PromptRenderer
from cluster.bench.running import BenchError
from cluster.bench.tables import comparison_text
from cluster.config import ClusterConfig
from cluster.reporting.table import Table
from cluster.simulator.choice_report import FORMAT_VERSION
from cluster.simulator.replay import Fixed

LIVE_BOUND = 0.93
FREE = "free"


@dataclass(frozen=True, slots=True)
class LiveCell:
    """A cell of the replay and its best fixed settings, the best first."""

    source: str
    dtype: str
    task: str
    concurrency: int
    best: tuple[Fixed, ...]


@dataclass(frozen=True, slots=True)
class LiveRow:
    """The free choice over one fixed setting in one cell; None without a common pair."""

    cell: LiveCell
    fixed: Fixed
    comparison: Comparison | None

    @property
    def holds(self) -> bool:
        low = None if self.comparison is None else self.comparison.low
        return low is not None and low >= LIVE_BOUND


def read_cells(replayed: Path, count: int, settings_a_cell: int) -> list[LiveCell]:
    """`count` cells of a choice.json, spread evenly from where drafting gains least to where it gains most.
    Scaled cells are left out: no such target exists. Raises BenchError for another file, OSError."""
    try:
        document = json.loads(replayed.read_text(encoding="utf-8"))
        if document["format"] != FORMAT_VERSION:
            raise BenchError(f"{replayed}: format {document['format']}, need {FORMAT_VERSION}")
        targets = {t["target"]: (t["source"], t["dtype"]) for t in document["traces"]}
        cells = [c for c in document["cells"] if c["scale"] == 1.0]
        gains = [c["fixed"][0]["tokens_per_s"] / _plain(c) for c in cells]
        order = [cells[i] for i in sorted(range(len(cells)), key=gains.__getitem__)]
        chosen = _spread(order, count)
        return [
            LiveCell(
                *targets[c["target"]],
                c["task"],
                c["concurrency"],
                tuple(Fixed(f["exit"], f["length"]) for f in c["fixed"][:settings_a_cell]),
            )
            for c in chosen
        ]
    except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
        raise BenchError(f"{replayed}: is no choice.json of `s2d bench replay`: {error!r}") from error


def _plain(cell: dict[str, Any]) -> float:
    return float(next(f["tokens_per_s"] for f in cell["fixed"] if not f["length"]))


def _spread(cells: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    if len(cells) <= count:
        return list(cells)
    if count == 1:
        return [cells[-1]]
    return [cells[round(i * (len(cells) - 1) / (count - 1))] for i in range(count)]


def speculation(fixed: Fixed | None) -> dict[str, Any]:
    """The field of a request that pins a setting; empty for the free choice."""
    if fixed is None:
        return {}
    if not fixed.length:
        return {"enabled": False}
    return {
        "max_draft_tokens": fixed.length,
        "force": True,
        "drafter": NESTED,
        "exit_depth": fixed.exit,
    }


async def measure_choice(
    settings: LiveSettings, folder: Path, say: Callable[[str], None] = lambda message: None
) -> list[LiveRow]:
    """Rows by cell. Files are written after every cell, so that a run that is cut off keeps what it has.
    Raises one of `cluster.bench.session.EXPECTED_ERRORS`."""
    questions = builtin() if settings.path is None else read_spec_bench(settings.path)
    questions = sample(questions, settings.per_task, settings.seed)
    rows: list[LiveRow] = []
    by_target: dict[tuple[str, str], list[LiveCell]] = {}
    for cell in read_cells(settings.replayed, settings.cells, settings.best):
        by_target.setdefault((cell.source, cell.dtype), []).append(cell)
    for (source, dtype), cells in by_target.items():
        server = S2DServer(served(settings.server_config, source, dtype))
        say(f"starting {source} in {dtype}")
        await server.acquire()
        try:
            for cell in cells:
                say(f"{cell.task}, {cell.concurrency} at once")
                rows += await _measure_cell(server, cell, questions, settings)
                write(folder, settings, rows)
        finally:
            await server.release()
    return rows


def served(file: Path, source: str, dtype: str) -> ClusterConfig:
    """The configuration with its first model alone, of this source and dtype, as the trace has it. Without a
    prefix cache: whoever comes first in a pair would compute the prompts of all."""
    data = ClusterConfig.from_yaml(file).model_dump(mode="json")
    first = data["models"][0]
    engine = first["engine"] | {"prefix_caching": False}
    data["models"] = [first | {"source": source, "dtype": dtype, "engine": engine}]
    return ClusterConfig.model_validate(data)


async def _measure_cell(
    server: S2DServer, cell: LiveCell, questions: Sequence[Question], settings: LiveSettings
) -> list[LiveRow]:
    asked = [q for q in questions if q.task == cell.task]
    if not asked:
        raise BenchError(f"path: there are no questions of {cell.task}")
    names = {fixed: f"fixed: {fixed.name}" for fixed in cell.best}
    # What is measured stays from block to block: a choice is judged once it is made. What drafters remember
    # of texts does not: the other arms have just given the same answers.
    arms = [S2DEngine(FREE, server, speculation(None), reset="caches")]
    arms += [S2DEngine(name, server, speculation(fixed), reset="caches") for fixed, name in names.items()]
    load = LoadSettings(
        engines=tuple(arm.name for arm in arms), source=cell.source, dtype=cell.dtype,
        concurrency=(cell.concurrency,), pairs=settings.pairs, max_tokens=settings.max_tokens,
        ignore_eos=False, requests_per_stream=settings.requests_per_stream,
        request_timeout_s=settings.request_timeout_s, seed=settings.seed,
    )  # fmt: skip
    for arm in arms:
        await arm.start()
    try:
        blocks = await run_load(arms, asked, PromptRenderer(_folder(cell.source)), load)
    finally:
        for arm in arms:
            await arm.stop()
    speeds: dict[str, dict[Hashable, float]] = {arm.name: {} for arm in arms}
    for block in blocks:
        speeds[block.engine][block.pair] = _tokens_per_s(block)
    return [
        LiveRow(cell, fixed, compare(speeds[FREE], speeds[name], LIVE_BOUND)) for fixed, name in names.items()
    ]


def _tokens_per_s(block: Block) -> float:
    """Raises BenchError for a block with failed requests: its speed means nothing."""
    failed = next((r.response.error for r in block.records if r.response.error is not None), None)
    if failed is not None:
        raise BenchError(f"{block.engine}, {block.point.label}: a request failed: {failed}")
    return sum(r.response.num_tokens for r in block.records) / block.duration_s


def _folder(source: str) -> Path:
    from actors.models.convert import model_folder
    from actors.models.source import resolve_source

    return model_folder(resolve_source(source))


def table(rows: Sequence[LiveRow]) -> Table:
    return Table(
        "Free choice over the best fixed settings of the replay",
        ("target", "task", "at once", "fixed", "paired ratio: median [95 %]", f"bound {LIVE_BOUND}"),
        tuple(
            (
                f"{r.cell.source} {r.cell.dtype}", r.cell.task, str(r.cell.concurrency), r.fixed.name,
                comparison_text(r.comparison), "holds" if r.holds else "not shown",
            )
            for r in rows
        ),
    )  # fmt: skip


def write(folder: Path, settings: LiveSettings, rows: Sequence[LiveRow]) -> None:
    """live.json and live.md in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "format": FORMAT_VERSION,
        "settings": settings.model_dump(mode="json"),
        "rows": [asdict(row) | {"holds": row.holds} for row in rows],
    }
    (folder / "live.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    (folder / "live.md").write_text(f"# Live check\n\n{table(rows).markdown()}", encoding="utf-8")
