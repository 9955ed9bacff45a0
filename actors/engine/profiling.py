"""Measuring what an engine's rounds cost, before the first request and again in idle moments."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial

import torch

from actors.engine.costs import CostModel
from actors.kv.block_pool import BlockPool
from actors.models.runner import BLOCK_SIZE, ModelRunner, RaggedBatch
from actors.sampling.reduce import best_ids

_ROWS = (1, 2, 3, 5, 9, 17, 33)
_SHORT_CONTEXT, _LONG_CONTEXT = 64, 1024
_ATTENDING_ROWS = 9
_ATTENDING_SEQUENCES, _TOGETHER_CONTEXT = 4, 512
_REMEASURED = 3
"""Times that everything is measured again in idle moments after the start: other processes of a deployment
start beside this one."""
_TURNS = 5
"""Turns of all row counts each time."""


class CostProfiler:
    """Fills `costs` from passes of `runner`, in blocks of `pool` that nobody holds. Engine thread only."""

    def __init__(self, runner: ModelRunner, pool: BlockPool, costs: CostModel, max_model_len: int) -> None:
        self._runner, self._pool, self._costs = runner, pool, costs
        self._longest = min(pool.num_blocks * BLOCK_SIZE, max_model_len)
        self._jobs: deque[Callable[[], None]] = deque()

    def profile(self) -> None:
        """Measure everything once."""
        self._profile_attention()
        usable = self._longest - _SHORT_CONTEXT
        row_counts = [rows for rows in _ROWS if rows <= usable]
        if not row_counts:
            return
        self._costs.profile(self._time_short, row_counts)
        turn = partial(self._costs.profile, self._time_short, row_counts, repeats=1)
        self._jobs.extend([self._profile_attention, *[turn] * _TURNS] * _REMEASURED)

    def work(self) -> bool:
        """Measure one thing again, if so many blocks hold nothing; False when nothing is left to be done."""
        if not self._jobs:
            return False
        job = self._jobs.popleft()
        together = _ATTENDING_SEQUENCES * self._pool.blocks_for(_TOGETHER_CONTEXT + 1)
        needed = max(together, self._pool.blocks_for(_LONG_CONTEXT + _ATTENDING_ROWS))
        if self._pool.num_free - self._pool.num_cached >= needed:
            job()
        return True

    def _profile_attention(self) -> None:
        long = min(_LONG_CONTEXT, self._longest - _ATTENDING_ROWS)
        if long < 4 * _SHORT_CONTEXT:
            return
        self._costs.profile_attention(self._time_rows, _ATTENDING_ROWS, (_SHORT_CONTEXT, long))
        long = min(_TOGETHER_CONTEXT, long)
        if _ATTENDING_SEQUENCES * (long + BLOCK_SIZE) <= self._pool.num_blocks * BLOCK_SIZE:
            self._costs.profile_together(self._time_together, _ATTENDING_SEQUENCES, (_SHORT_CONTEXT, long))

    def _time_short(self, rows: int) -> float:
        return self._time_rows(rows, _SHORT_CONTEXT)

    def _time_rows(self, rows: int, context: int) -> float:
        """Seconds of a round of so many rows of one sequence."""
        ids = torch.zeros(rows, dtype=torch.int64, device=self._runner.info.device)
        return self._time(RaggedBatch.chain(ids, context))

    def _time_together(self, sequences: int, context: int) -> float:
        """The same of one row each of several sequences."""
        device = self._runner.info.device
        one = RaggedBatch.chain(torch.zeros(1, dtype=torch.int64, device=device), context)
        return self._time(
            RaggedBatch(
                token_ids=one.token_ids.repeat(sequences),
                positions=one.positions.repeat(sequences),
                query_start=torch.arange(sequences + 1, device=device),
                context_lens=one.context_lens.repeat(sequences),
                block_tables=one.block_tables.repeat(sequences, 1),
                logit_rows=torch.arange(sequences, device=device),
            )
        )

    @torch.inference_mode()
    def _time(self, batch: RaggedBatch) -> float:
        """Of a pass, in blocks of its own."""
        tables = batch.block_tables
        blocks = self._pool.allocate(tables.numel())
        batch.block_tables = torch.tensor(blocks, dtype=torch.int32, device=tables.device).view(tables.shape)
        try:
            started = time.perf_counter()
            best_ids(self._runner.forward(batch))
            return time.perf_counter() - started
        finally:
            self._pool.release(blocks)
