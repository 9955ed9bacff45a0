"""Step times of one runner: against rows, against context and batch, beside the time to read its weights.

A step is one forward pass that asks for the logits of all its rows. Rows are rows of one sequence (a draft
under verification); in the other measurement every sequence has one row (plain decoding). All points take
turns, in an order drawn anew each time, so that a slow minute of the machine hits all of them alike. Only the
time counts: the KV pool holds the same few tokens everywhere, written once, because memory never written to
would be read from one page of zeros.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from actors.models.load import load_runner
from actors.models.native_llama import NativeLlamaRunner
from actors.models.runner import BLOCK_SIZE, ModelRunner, RaggedBatch
from cluster.bench.config import StepSettings
from cluster.bench.running import BenchError
from cluster.config import DTypeName

_COPY_BLOCKS = 64
"""Blocks a call: the core copies through a buffer."""


@dataclass(frozen=True, slots=True)
class StepPoint:
    """`seqs` sequences with `rows` rows each; the last row of each sees `context` KV entries."""

    seqs: int
    rows: int
    context: int


@dataclass(slots=True)
class StepTimes:
    """Seconds by repeat. floors_s: one reading of all weights in each repeat; empty without the native core,
    which alone can tell."""

    dtype: DTypeName
    backend: str
    isa: str
    threads: int
    weight_bytes: int
    floors_s: list[float] = field(default_factory=list)
    rows_s: dict[int, list[float]] = field(default_factory=dict)
    contexts_s: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    """By (batch, context)."""


def step_batch(point: StepPoint) -> RaggedBatch:
    """Each sequence has blocks of its own, so that none profits from what another has read."""
    per_seq = -(-point.context // BLOCK_SIZE)
    tokens = point.seqs * point.rows
    first = point.context - point.rows
    return RaggedBatch(
        token_ids=torch.ones(tokens, dtype=torch.int64),
        positions=torch.arange(first, point.context).repeat(point.seqs),
        query_start=torch.arange(0, tokens + 1, point.rows),
        context_lens=torch.full((point.seqs,), point.context),
        block_tables=torch.arange(point.seqs * per_seq, dtype=torch.int32).view(point.seqs, per_seq),
        logit_rows=torch.arange(tokens),
    )


def row_points(settings: StepSettings) -> dict[int, StepPoint]:
    return {rows: StepPoint(1, rows, settings.row_context + rows) for rows in settings.rows}


def context_points(settings: StepSettings) -> dict[tuple[int, int], StepPoint]:
    return {
        (batch, context): StepPoint(batch, 1, context)
        for batch in settings.batches
        for context in settings.contexts
    }


def blocks_needed(points: Sequence[StepPoint]) -> int:
    return max(p.seqs * -(-p.context // BLOCK_SIZE) for p in points)


def fill_kv(runner: ModelRunner) -> None:
    """Write every slot of the pool: one block is computed, the others are copies."""
    runner.forward(step_batch(StepPoint(1, BLOCK_SIZE, BLOCK_SIZE)))
    source = torch.arange(BLOCK_SIZE)
    for start in range(1, runner.num_blocks, _COPY_BLOCKS):
        count = min(_COPY_BLOCKS, runner.num_blocks - start)
        target = torch.arange(start * BLOCK_SIZE, (start + count) * BLOCK_SIZE)
        runner.copy_slots(source.repeat(count), target)


def measure_steps(
    dtype: DTypeName,
    settings: StepSettings,
    keep: list[StepTimes],
    advance: Callable[[], None] = lambda: None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Times go to `keep` when the first repeat is there and grow with each, so that an interrupted run keeps
    what it has; then `advance` is called. Raises BenchError for a context beyond the model's."""
    rows, contexts = row_points(settings), context_points(settings)
    points = [*rows.values(), *contexts.values()]
    loaded = load_runner(
        settings.source,
        dtype=dtype,
        kv_blocks=blocks_needed([*points, StepPoint(1, BLOCK_SIZE, BLOCK_SIZE)]),
        threads=settings.threads,
        progress=say,
    )
    runner = loaded.runner
    native = runner if isinstance(runner, NativeLlamaRunner) else None
    try:
        longest = max(p.context for p in points)
        if longest > loaded.info.max_model_len:
            raise BenchError(f"contexts: the model has {loaded.info.max_model_len} positions, not {longest}")
        fill_kv(runner)
        times = StepTimes(
            dtype,
            loaded.backend,
            native.isa if native else "none",
            native.threads if native else torch.get_num_threads(),
            native.weight_bytes if native else 0,
        )
        batches = {point: step_batch(point) for point in dict.fromkeys(points)}
        for point in batches:
            runner.forward(batches[point])  # once unmeasured: pages and scratch buffers
        order = random.Random(settings.seed)
        jobs = _jobs(times, rows, contexts)
        for repeat in range(settings.repeats):
            if native is not None:
                times.floors_s.append(native.weight_read_seconds())
            order.shuffle(jobs)
            for point, record in jobs:
                started = time.perf_counter()
                runner.forward(batches[point])
                record(time.perf_counter() - started)
            if repeat == 0:
                keep.append(times)
            advance()
    finally:
        if native is not None:
            native.close()


def _jobs(
    times: StepTimes, rows: dict[int, StepPoint], contexts: dict[tuple[int, int], StepPoint]
) -> list[tuple[StepPoint, Callable[[float], None]]]:
    jobs: list[tuple[StepPoint, Callable[[float], None]]] = []
    for count, point in rows.items():
        jobs.append((point, times.rows_s.setdefault(count, []).append))
    for key, point in contexts.items():
        jobs.append((point, times.contexts_s.setdefault(key, []).append))
    return jobs
