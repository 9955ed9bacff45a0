"""Deferred KV: layer blocks of a nested draft hold caches of different lengths ("adaptive caching" of S2D,
arXiv 2407.01955).

Exits n_1 < n_2 < ... cut the layers into blocks. A token drafted at exit n_1 has KV in the first block only;
its hidden state waits, and the next step that goes deeper runs all waiting states of the sequence through the
next block in one causal pass. KV slots and waiting states share slot numbers, so one block table a sequence
serves every layer, and a rollback only shortens lengths.

Exits may have a layer of their own on top of their block (one extra trained layer an exit). Such a layer is a
segment like a block, fed by it: E layer blocks are segments 0 .. E - 1, the exits' own layers E .. 2 E - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from actors.drafting.state_input import StateInput
from actors.kv.block_pool import BlockPool
from actors.models.runner import (
    BLOCK_SIZE,
    ChainStart,
    ChainWish,
    DraftedChain,
    DraftingRunner,
    LayeredRunner,
    RaggedBatch,
    StateRow,
)


@dataclass(slots=True)
class DeferredSequence:
    """`lengths[s]` tokens have KV in segment s; the states of tokens lengths[s] .. lengths[feeds[s]] wait for
    it, and for segment 0 (fed by -1, the tokens) those of lengths[0] .. len(tokens). Of the tokens before
    `first`, a multiple of BLOCK_SIZE, no KV is kept (`DeferredKv.slide`); `blocks` begin there. `states`
    holds, by index, the target's last hidden state where it emitted the token."""

    tokens: list[int]
    lengths: list[int]
    feeds: tuple[int, ...]
    blocks: list[int] = field(default_factory=list)
    first: int = 0
    states: dict[int, StateRow] = field(default_factory=dict)

    def slot(self, index: int) -> int:
        """KV slot of the token at an index."""
        entry = index - self.first
        return self.blocks[entry // BLOCK_SIZE] * BLOCK_SIZE + entry % BLOCK_SIZE

    def waiting(self, segment: int) -> int:
        """Tokens that a segment could take now."""
        feed = self.feeds[segment]
        return (len(self.tokens) if feed < 0 else self.lengths[feed]) - self.lengths[segment]

    def rollback(self, length: int) -> None:
        """Forget KV and waiting states of tokens from index `length` on, in every segment."""
        self.lengths = [min(n, length) for n in self.lengths]


class DeferredKv:
    """The paged store of one nested draft and the passes over it.

    Args:
        runner: the draft model with its KV pool.
        exits: depths in layers, ascending; the last may be the model's depth.
        own_layers: the runner's last len(exits) layers belong to one exit each, in order.
        state_in: float32 [H, S], from the target's normalised states to what is added to the embeddings
            of the tokens that it emitted there; None for a draft that reads no states.
    """

    def __init__(
        self,
        runner: LayeredRunner,
        exits: Sequence[int],
        *,
        own_layers: bool = False,
        state_in: Tensor | None = None,
    ) -> None:
        depth = runner.info.num_layers - (len(exits) if own_layers else 0)
        if not exits or list(exits) != sorted(set(exits)) or exits[0] < 1 or exits[-1] > depth:
            raise ValueError(f"exits must ascend strictly within 1..{depth}, got {tuple(exits)}")
        self._runner = runner
        self._state_in = None if state_in is None else StateInput(state_in)
        count = len(exits)
        ranges = [*pairwise((0, *exits))]
        feeds = [-1, *range(count - 1)]
        if own_layers:
            ranges += [(exits[-1] + i, exits[-1] + i + 1) for i in range(count)]
            feeds += range(count)
        self._ranges, self._feeds = tuple(ranges), tuple(feeds)
        self._num_exits, self._own_layers = count, own_layers
        self._device = runner.info.device
        # Found once: checking a protocol takes a good part of what a draft does.
        self._drafting = runner if isinstance(runner, DraftingRunner) else None
        self._pool = BlockPool(runner.num_blocks, BLOCK_SIZE, prefix_caching=False)
        slots = runner.num_blocks * BLOCK_SIZE
        # States that a segment leaves to those it feeds, by slot. Segment 0 is fed by the token ids.
        self._states = {
            feed: torch.zeros(slots, runner.info.hidden_size, dtype=torch.float32, device=self._device)
            for feed in sorted(set(feeds) - {-1})
        }

    @property
    def num_segments(self) -> int:
        return len(self._ranges)

    def exit_segment(self, exit_index: int) -> int:
        """The segment whose output is read at an exit."""
        return self._num_exits + exit_index if self._own_layers else exit_index

    def path(self, exit_index: int) -> tuple[int, ...]:
        """Segments that a token runs through to be read at an exit, in order."""
        own = (self.exit_segment(exit_index),) if self._own_layers else ()
        return (*range(exit_index + 1), *own)

    @property
    def blocks_free(self) -> int:
        return self._pool.num_free

    @property
    def blocks_total(self) -> int:
        return self._pool.num_blocks

    def new_sequence(self, tokens: Sequence[int]) -> DeferredSequence:
        return DeferredSequence(list(tokens), [0] * self.num_segments, self._feeds)

    def missing_blocks(self, seq: DeferredSequence, num_tokens: int) -> int:
        """KV blocks to allocate before `num_tokens` tokens of the sequence fit."""
        return max(0, self._pool.blocks_for(num_tokens - seq.first) - len(seq.blocks))

    def reserve(self, seq: DeferredSequence, num_tokens: int) -> None:
        """Allocate blocks for `num_tokens` tokens. Raises OutOfBlocksError, taking nothing."""
        seq.blocks.extend(self._pool.allocate(self.missing_blocks(seq, num_tokens)))

    def release(self, seq: DeferredSequence) -> None:
        """Give back the sequence's blocks; its tokens would have to be run again."""
        self._pool.release(seq.blocks)
        seq.blocks = []
        seq.first = 0
        seq.rollback(0)

    def slide(self, seq: DeferredSequence, first: int) -> None:
        """Keep nothing of tokens before `first`, rounded down to a block: what a draft with an attention
        window no longer sees. Segments that had not got there go on from it, without what came before."""
        first = first // BLOCK_SIZE * BLOCK_SIZE
        if first <= seq.first:
            return
        gone = (first - seq.first) // BLOCK_SIZE
        self._pool.release(seq.blocks[:gone])
        seq.blocks = seq.blocks[gone:]
        seq.first = first
        seq.lengths = [max(n, first) for n in seq.lengths]
        for index in [i for i in seq.states if i < first]:
            del seq.states[index]

    def advance(self, seqs: Sequence[DeferredSequence], segment: int, counts: Sequence[int]) -> Tensor:
        """Run the next `counts[r] >= 1` waiting tokens of each sequence through a segment.

        Returns the hidden state (not normalised) of each sequence's last token of the pass, float32 [R, H].
        """
        spans: list[range] = []
        for seq, count in zip(seqs, counts, strict=True):
            if not 1 <= count <= seq.waiting(segment):
                raise ValueError(f"{count} tokens asked, {seq.waiting(segment)} wait for segment {segment}")
            spans.append(range(seq.lengths[segment], seq.lengths[segment] + count))
        if any(
            seq.first + len(seq.blocks) * BLOCK_SIZE < span.stop
            for seq, span in zip(seqs, spans, strict=True)
        ):
            raise ValueError("KV blocks must be reserved first")
        batch = self._batch(seqs, spans)
        slots = torch.tensor(
            [seq.slot(i) for seq, span in zip(seqs, spans, strict=True) for i in span],
            dtype=torch.int64,
            device=self._device,
        )
        feed = self._feeds[segment]
        hidden = self._embedded(batch, seqs, spans) if feed < 0 else self._states[feed][slots]
        hidden = self._runner.run_layers(hidden, *self._ranges[segment], batch)
        if segment in self._states:
            self._states[segment][slots] = hidden
        for seq, span in zip(seqs, spans, strict=True):
            seq.lengths[segment] = span.stop
        return hidden[batch.logit_rows]

    def draft(self, seqs: Sequence[DeferredSequence], exit_index: int, wish: ChainWish) -> list[DraftedChain]:
        """Draft for sequences that `runs_through` to an exit, in one call of a `DraftingRunner`. Blocks must
        be reserved for all but the last token of each draft. The caller appends the tokens."""
        assert self._drafting is not None
        spans = [range(seq.lengths[0], len(seq.tokens)) for seq in seqs]
        more = [budget - 1 for budget in wish.budgets]
        start = self._start(seqs, spans, more, *self._added(seqs, spans))
        states = self._states.get(exit_index)
        found = self._drafting.draft_chain(self._ranges[exit_index][1], start, wish, states)
        for seq, chain in zip(seqs, found, strict=True):
            run = len(seq.tokens) + len(chain.token_ids) - 1
            seq.lengths[: exit_index + 1] = [run] * (exit_index + 1)
        return found

    def runs_through(self, seq: DeferredSequence, exit_index: int) -> bool:
        """Whether the same tokens wait for every layer up to an exit, and the runner drafts in one call."""
        return (
            self._drafting is not None
            and not self._own_layers
            and all(n == seq.lengths[0] for n in seq.lengths[1 : exit_index + 1])
        )

    def _embedded(
        self, batch: RaggedBatch, seqs: Sequence[DeferredSequence], spans: Sequence[range]
    ) -> Tensor:
        hidden = self._runner.embed(batch.token_ids)
        rows, added = self._added(seqs, spans)
        if added is not None:
            hidden.index_add_(0, torch.tensor(rows, device=hidden.device), added)
        return hidden

    def _added(
        self, seqs: Sequence[DeferredSequence], spans: Sequence[range]
    ) -> tuple[list[int], Tensor | None]:
        """Tokens of a pass whose target states are known, and what they add to the embeddings."""
        if self._state_in is None or not any(seq.states for seq in seqs):
            return [], None
        read = [seq.states.get(i) for seq, span in zip(seqs, spans, strict=True) for i in span]
        rows = [row for row, state in enumerate(read) if state is not None]
        if not rows:
            return [], None
        # Here and not when they come: of a session that is seldom asked for, most are never read.
        return rows, self._state_in([state for state in read if state is not None])

    @staticmethod
    def _start(
        seqs: Sequence[DeferredSequence],
        spans: Sequence[range],
        more: Sequence[int] = (),
        added_rows: Sequence[int] = (),
        added: Tensor | None = None,
    ) -> ChainStart:
        """`more`: tokens for which the block tables have room beyond those of the pass, a sequence each."""
        lengths = [span.stop - seq.first for seq, span in zip(seqs, spans, strict=True)]
        filled = [length + extra for length, extra in zip(lengths, more or [0] * len(lengths), strict=True)]
        width = max(-(-length // BLOCK_SIZE) for length in filled)
        tables = []
        for seq, length in zip(seqs, filled, strict=True):
            used = seq.blocks[: -(-length // BLOCK_SIZE)]
            tables.append(used + [0] * (width - len(used)))
        return ChainStart(
            token_ids=[
                t for seq, span in zip(seqs, spans, strict=True) for t in seq.tokens[span.start : span.stop]
            ],
            positions=[i for span in spans for i in span],
            query_start=[*accumulate((len(span) for span in spans), initial=0)],
            context_lens=lengths,
            block_tables=tables,
            added_rows=added_rows,
            added=added,
        )

    def _batch(self, seqs: Sequence[DeferredSequence], spans: Sequence[range]) -> RaggedBatch:
        start = self._start(seqs, spans)

        def int64(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=self._device)

        return RaggedBatch(
            token_ids=int64(start.token_ids),
            positions=int64(start.positions),
            query_start=int64(start.query_start),
            context_lens=int64(start.context_lens),
            block_tables=torch.tensor(start.block_tables, dtype=torch.int32, device=self._device),
            logit_rows=int64([end - 1 for end in start.query_start[1:]]),
        )
