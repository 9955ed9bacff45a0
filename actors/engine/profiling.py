"""Measuring what an engine's rounds cost, before the first request and again in idle moments."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from actors.costs import CostModel
from actors.kv.block_pool import BlockPool
from actors.models.runner import BLOCK_SIZE, ModelRunner, RaggedBatch
from actors.sampling.reduce import best_ids

_ROWS = (1, 2, 3, 5, 9, 17, 33)
_SHORT_CONTEXT, _LONG_CONTEXT = 64, 1024
_ATTENDING_ROWS = 9
_ATTENDING_SEQUENCES, _TOGETHER_CONTEXT = 4, 512
_REPEATS = 3
"""Passes of each kind at a time where the quickest counts, and turns of all row counts at the start."""
_REMEASURED = 3
"""Times that everything is measured again in idle moments after the start: other processes of a deployment
start beside this one."""
_TURNS = 5
"""Turns of all row counts each time."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """Of `rows` rows of each of several sequences, behind `context` KV entries."""

    rows: int
    context: int
    sequences: int = 1


@dataclass(frozen=True, slots=True)
class _Job:
    """Passes in order, and what takes their times from `CostProfiler._quickest_s`."""

    passes: Sequence[_Pass]
    apply: Callable[[], None]
    compared: bool = False
    """Whether they are compared with each other, so that no request may come between."""


class CostProfiler:
    """Fills `costs` from passes of `runner`, in blocks of `pool` that nobody holds. Engine thread only."""

    def __init__(self, runner: ModelRunner, pool: BlockPool, costs: CostModel, max_model_len: int) -> None:
        self._runner, self._pool, self._costs = runner, pool, costs
        self._longest = min(pool.num_blocks * BLOCK_SIZE, max_model_len)
        self._jobs: deque[_Job] = deque()
        self._done = 0
        """Passes of the first job that have run, and their seconds: the quickest of equal ones."""
        self._quickest_s: dict[_Pass, float] = {}

    def profile(self) -> None:
        """Measure everything once."""
        usable = self._longest - _SHORT_CONTEXT
        row_counts = [rows for rows in _ROWS if rows <= usable]
        if not row_counts:
            return
        attention = self._attention_jobs()
        turn = _Job(
            [_Pass(rows, _SHORT_CONTEXT) for rows in row_counts],
            partial(self._costs.profile, self._short_s, row_counts, repeats=1),
            compared=True,
        )
        for job in (*attention, *[turn] * _REPEATS):
            self._run(job, lambda: False)
        self._jobs.extend([*attention, *[turn] * _TURNS] * _REMEASURED)

    def work(self, waiting: Callable[[], bool]) -> bool:
        """Measure one thing again, if so many blocks hold nothing; False when nothing is left to be done.

        Ends after any pass once something is `waiting`; the next call goes on from there.
        """
        if not self._jobs:
            return False
        together = _ATTENDING_SEQUENCES * self._pool.blocks_for(_TOGETHER_CONTEXT + 1)
        needed = max(together, self._pool.blocks_for(_LONG_CONTEXT + _ATTENDING_ROWS))
        if self._pool.num_free - self._pool.num_cached < needed:
            self._begin_anew()
        elif not self._run(self._jobs[0], waiting):
            return True
        self._jobs.popleft()
        return True

    def interrupted(self) -> None:
        """A request has come: what is compared with each other is measured from the start again."""
        if self._jobs and self._jobs[0].compared:
            self._begin_anew()

    def _begin_anew(self) -> None:
        self._done = 0
        self._quickest_s.clear()

    def _run(self, job: _Job, waiting: Callable[[], bool]) -> bool:
        """Whether it is complete."""
        while self._done < len(job.passes):
            if waiting():
                return False
            one = job.passes[self._done]
            seconds = self._time(one)
            self._quickest_s[one] = min(seconds, self._quickest_s.get(one, seconds))
            self._done += 1
        job.apply()
        self._begin_anew()
        return True

    def _attention_jobs(self) -> list[_Job]:
        long = min(_LONG_CONTEXT, self._longest - _ATTENDING_ROWS)
        if long < 4 * _SHORT_CONTEXT:
            return []
        contexts = (_SHORT_CONTEXT, long)
        apply = partial(self._costs.profile_attention, self._alone_s, _ATTENDING_ROWS, contexts, repeats=1)
        passes = [*_in_turns(1, 1, contexts), *_in_turns(_ATTENDING_ROWS, 1, contexts)]
        jobs = [_Job(passes, apply)]
        contexts = (_SHORT_CONTEXT, min(_TOGETHER_CONTEXT, long))
        if _ATTENDING_SEQUENCES * (contexts[1] + BLOCK_SIZE) <= self._pool.num_blocks * BLOCK_SIZE:
            apply = partial(
                self._costs.profile_together, self._together_s, _ATTENDING_SEQUENCES, contexts, repeats=1
            )
            jobs.append(_Job(_in_turns(1, _ATTENDING_SEQUENCES, contexts), apply))
        return jobs

    def _short_s(self, rows: int) -> float:
        return self._quickest_s[_Pass(rows, _SHORT_CONTEXT)]

    def _alone_s(self, rows: int, context: int) -> float:
        return self._quickest_s[_Pass(rows, context)]

    def _together_s(self, sequences: int, context: int) -> float:
        return self._quickest_s[_Pass(1, context, sequences)]

    @torch.inference_mode()
    def _time(self, one: _Pass) -> float:
        """Seconds of a round, in blocks of its own."""
        device, sequences = self._runner.info.device, one.sequences
        alone = RaggedBatch.chain(torch.zeros(one.rows, dtype=torch.int64, device=device), one.context)
        blocks = self._pool.allocate(alone.block_tables.numel() * sequences)
        batch = RaggedBatch(
            token_ids=alone.token_ids.repeat(sequences),
            positions=alone.positions.repeat(sequences),
            query_start=torch.arange(sequences + 1, device=device) * one.rows,
            context_lens=alone.context_lens.repeat(sequences),
            block_tables=torch.tensor(blocks, dtype=torch.int32, device=device).view(sequences, -1),
            logit_rows=torch.arange(sequences * one.rows, device=device),
        )
        try:
            started = time.perf_counter()
            best_ids(self._runner.forward(batch))
            return time.perf_counter() - started
        finally:
            self._pool.release(blocks)


def _in_turns(rows: int, sequences: int, contexts: tuple[int, int]) -> list[_Pass]:
    """The long context first. In turns: a busy moment is not one context's alone."""
    return [_Pass(rows, context, sequences) for context in reversed(contexts)] * _REPEATS
