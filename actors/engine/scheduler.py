"""Continuous batching: who runs in the next step, with how many tokens, in which KV blocks.

Decoding sequences come first, with their drafts; prompts fill what is left of the step in chunks, smaller
ones while streams are running, so that nobody's stream stalls. When blocks run out, drafts are dropped
first, then the youngest sequence gives its blocks back and is computed again later.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass

from actors.drafting.interface import SessionDraft
from actors.engine.sequence import Sequence, Work
from actors.kv.block_pool import BlockPool


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """max_num_seqs running sequences; max_batched_tokens rows a step; prefill_chunk prompt tokens a step
    while anybody decodes."""

    max_num_seqs: int
    max_batched_tokens: int
    prefill_chunk: int


Drafts = Mapping[Sequence, tuple[SessionDraft, int]]
"""For each decoding sequence with drafts: the proposal, and how many of its tokens to verify."""


class Scheduler:
    """Owns the waiting and running sets and the block pool. Engine thread only."""

    def __init__(self, pool: BlockPool, limits: SchedulerLimits) -> None:
        self.pool = pool
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running: OrderedDict[str, Sequence] = OrderedDict()
        self.num_preemptions = 0

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def find(self, request_id: str) -> Sequence | None:
        found = self.running.get(request_id)
        return found or next((s for s in self.waiting if s.request.request_id == request_id), None)

    def remove(self, seq: Sequence) -> None:
        """Take a finished or aborted sequence out and free its blocks."""
        if self.running.pop(seq.request.request_id, None) is None:
            self.waiting.remove(seq)
        self._free(seq)

    def schedule(self, drafts: Drafts) -> list[Work]:
        """Choose the step's work, allocating blocks for every row of it."""
        budget = self.limits.max_batched_tokens
        works: list[Work] = []
        decoding = [seq for seq in self.running.values() if seq.decoding]
        prompts = bool(self.waiting) or len(decoding) < len(self.running)
        # Drafts leave a row for each sequence that comes after, and a chunk for prompts.
        reserved = len(decoding) + (self.limits.prefill_chunk if prompts else 0)
        for seq in decoding:
            reserved -= 1
            if seq.request.request_id not in self.running:
                continue  # preempted for an older one in this very loop
            rows = self._fit_decode(seq, drafts.get(seq), budget, reserved)
            if rows is not None:
                works.append(rows)
                budget -= rows.num_rows
        works = [w for w in works if w.seq.request.request_id in self.running]
        prompt_budget = min(budget, self.limits.prefill_chunk) if works else budget
        for seq in [s for s in self.running.values() if not s.decoding]:
            if prompt_budget <= 0:
                return works
            prompt_budget -= self._add_prompt_chunk(seq, prompt_budget, works)
        while prompt_budget > 0 and self._admit_next():
            seq = next(reversed(self.running.values()))
            prompt_budget -= self._add_prompt_chunk(seq, prompt_budget, works)
        return works

    def _fit_decode(
        self, seq: Sequence, drafted: tuple[SessionDraft, int] | None, budget: int, reserved: int
    ) -> Work | None:
        if budget < 1:
            return None
        proposal, length = drafted if drafted is not None else (None, 0)
        length = max(0, min(length, budget - 1 - reserved))
        while length > 0 and self._missing_blocks(seq, 1 + length) > self.pool.num_free:
            length -= 1
        if not self._ensure_blocks(seq, 1 + length):
            return None
        if proposal is None or not length:
            return Work(seq, 1)
        return Work(seq, 1, proposal.token_ids[:length], proposal, proposal.parents[:length])

    def _add_prompt_chunk(self, seq: Sequence, budget: int, works: list[Work]) -> int:
        chunk = min(seq.num_pending, budget)
        # Inside a step only the prompt side may give way to what already runs, never the other way round.
        if self._missing_blocks(seq, chunk) > self.pool.num_free:
            chunk = len(seq.blocks) * self.pool.block_size - seq.num_computed
            chunk += self.pool.num_free * self.pool.block_size
            chunk = min(chunk, seq.num_pending, budget)
        if chunk <= 0:
            if not works:
                # Only prompts run and none can grow: the youngest waits until the others are through.
                self._preempt_youngest(keep=seq)
            return 0
        self._grow(seq, chunk)
        works.append(Work(seq, chunk))
        return chunk

    def _admit_next(self) -> bool:
        """Start the oldest waiting sequence if a slot and blocks for all its known tokens are there."""
        if not self.waiting or len(self.running) >= self.limits.max_num_seqs:
            return False
        seq = self.waiting[0]
        keys = seq.full_block_keys(self.pool.block_size, len(seq.token_ids) - 1)
        blocks = [] if seq.scores_prompt else self.pool.match_prefix(keys)
        needed = self.pool.blocks_for(len(seq.token_ids) + 1) - len(blocks)
        if needed > self.pool.num_free:
            self.pool.release(blocks)
            return False
        self.waiting.popleft()
        seq.blocks = blocks
        seq.num_published = len(blocks)
        seq.num_computed = len(blocks) * self.pool.block_size
        if not seq.started_at:
            seq.started_at = time.perf_counter()
            # After a preemption the cache has this sequence's own work.
            seq.cached_tokens = min(seq.num_computed, seq.prompt_len)
        self.running[seq.request.request_id] = seq
        return True

    def _missing_blocks(self, seq: Sequence, num_rows: int) -> int:
        return max(0, self.pool.blocks_for(seq.num_computed + num_rows) - len(seq.blocks))

    def _grow(self, seq: Sequence, num_rows: int) -> None:
        seq.blocks.extend(self.pool.allocate(self._missing_blocks(seq, num_rows)))

    def _ensure_blocks(self, seq: Sequence, num_rows: int) -> bool:
        """Blocks for `num_rows` more entries, at the cost of younger sequences; False if `seq` had to go."""
        while self._missing_blocks(seq, num_rows) > self.pool.num_free:
            if self._preempt_youngest() is seq:
                return False
        self._grow(seq, num_rows)
        return True

    def _preempt_youngest(self, keep: Sequence | None = None) -> Sequence | None:
        for seq in reversed(self.running.values()):
            if seq is not keep:
                del self.running[seq.request.request_id]
                self._free(seq)
                self.waiting.appendleft(seq)
                self.num_preemptions += 1
                return seq
        return None

    def _free(self, seq: Sequence) -> None:
        self.pool.release(seq.blocks)
        seq.blocks = []
        seq.num_computed = 0
        seq.num_published = 0

    def commit(self, seq: Sequence, num_computed: int) -> None:
        """Set how many KV entries are truth, and make newly full blocks findable."""
        seq.num_computed = num_computed
        full = num_computed // self.pool.block_size
        if full > seq.num_published and self.pool.prefix_caching:
            keys = seq.full_block_keys(self.pool.block_size, num_computed)
            for index in range(seq.num_published, full):
                self.pool.publish(seq.blocks[index], keys[index])
            seq.num_published = full
