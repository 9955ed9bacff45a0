"""The seam between an engine and a model: ragged forward passes over a paged KV cache.

A batch packs the tokens of all sequences without padding. KV lives in blocks of `BLOCK_SIZE` slots; a
sequence's block table maps its token index to slots. Rolling back is not the runner's business: the caller
passes shorter lengths next time, and slots past a sequence's length are never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

BLOCK_SIZE = 32


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Shape of a model. `max_model_len` is in tokens; `num_layers` decoder layers.

    `dtype` is that of the embedding, the KV pool and, unless `int8`, of the weights. With `int8` the weights
    of linear layers and of the head are quantised from it.
    """

    name: str
    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    dtype: torch.dtype
    device: torch.device
    int8: bool = False

    @property
    def dtype_name(self) -> str:
        """What the configuration calls it: float32, bfloat16 or int8."""
        return "int8" if self.int8 else str(self.dtype).removeprefix("torch.")


@dataclass(slots=True)
class RaggedBatch:
    """R sequences, T tokens in all, packed one after the other.

    token_ids: int64 [T].
    positions: int64 [T], absolute position of each token (its rotary position).
    query_start: int64 [R + 1], offsets of each sequence's tokens in the packed arrays.
    context_lens: int64 [R], KV entries of the sequence after this pass, its tokens of this pass included;
        token t of sequence r is KV entry `context_lens[r] - (query_start[r + 1] - t)`.
    block_tables: int32 [R, B], blocks of each sequence in order; unused entries are 0.
    logit_rows: int64 [N], packed indices whose logits are wanted.
    parents: None for chains: each token sees all earlier KV entries of its sequence and itself. Otherwise
        int64 [T], packed index of the parent inside this pass, -1 for the last entry before it (a tree).
    """

    token_ids: Tensor
    positions: Tensor
    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    logit_rows: Tensor
    parents: Tensor | None = None

    def __post_init__(self) -> None:
        if self.token_ids.numel() != self.positions.numel():
            raise ValueError("one position a token")
        if self.query_start.numel() != self.context_lens.numel() + 1:
            raise ValueError("query_start needs one entry more than context_lens")
        if self.block_tables.shape[0] != self.context_lens.numel():
            raise ValueError("one block table a sequence")

    @classmethod
    def chain(cls, token_ids: Tensor, start: int = 0, last: int | None = None) -> RaggedBatch:
        """Tokens of one sequence from KV entry `start` on, in blocks 0, 1, ...; with the logits of the last
        `last` of them, by default of all."""
        count, device = token_ids.numel(), token_ids.device
        end = start + count
        return cls(
            token_ids=token_ids,
            positions=torch.arange(start, end, device=device),
            query_start=torch.tensor([0, count], device=device),
            context_lens=torch.tensor([end], device=device),
            block_tables=torch.arange(-(-end // BLOCK_SIZE), dtype=torch.int32, device=device)[None],
            logit_rows=torch.arange(count - (count if last is None else last), count, device=device),
        )

    @property
    def num_tokens(self) -> int:
        return self.token_ids.numel()

    @property
    def num_seqs(self) -> int:
        return self.context_lens.numel()


class ModelRunner(Protocol):
    """A target model with its own KV pool of `num_blocks` blocks."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def row_invariant(self) -> bool:
        """Whether the bits of a row depend on nothing but its own sequence (DESIGN: numerics)."""
        ...

    @property
    def supports_trees(self) -> bool: ...

    def forward(self, batch: RaggedBatch) -> Tensor:
        """Write the batch's KV, return float32 logits [N, V] of `logit_rows`."""
        ...

    def copy_slots(self, source: Tensor, target: Tensor) -> None:
        """Copy KV slots (int64 flat slot indices, block * BLOCK_SIZE + offset) in every layer."""
        ...


@runtime_checkable
class LayeredRunner(ModelRunner, Protocol):
    """A runner whose layers can be run in ranges, which nested drafting needs.

    `forward(batch)` equals `logits(run_layers(embed(token_ids), 0, num_layers, batch)[logit_rows])`.
    """

    def forward_with_states(self, batch: RaggedBatch) -> tuple[Tensor, Tensor]:
        """As `forward`: last hidden states [N, H] of `logit_rows`, before the final norm, and their logits
        [N, V]."""
        ...

    def embed(self, token_ids: Tensor) -> Tensor:
        """float32 [T, H]."""
        ...

    def run_layers(self, hidden: Tensor, first: int, last: int, batch: RaggedBatch) -> Tensor:
        """Run layers first..last-1 on hidden [T, H] (not normalised), writing their KV."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: float32 [N, V]."""
        ...


@dataclass(frozen=True, slots=True)
class ChainStart:
    """What drafts of R sequences begin with: T tokens that wait for every layer, those of a sequence one
    after the other, as in `RaggedBatch`. Lists: for the few numbers of a draft they are quicker than tensors.

    token_ids, positions: T. query_start: R + 1. context_lens: R, the waiting tokens included.
    block_tables: R rows of one width, with room for all tokens of the drafts but the last.
    added_rows, added: N tokens of these and float32 [N, H], contiguous: what is added to their embeddings.
    """

    token_ids: Sequence[int]
    positions: Sequence[int]
    query_start: Sequence[int]
    context_lens: Sequence[int]
    block_tables: Sequence[Sequence[int]]
    added_rows: Sequence[int] = ()
    added: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ChainWish:
    """How drafts of R sequences are made and when they end.

    budgets: R longest lengths, at least 1. floors: R probabilities; a draft ends with the token that brings
    the probability that all of it is accepted below. best: tokens reported a place.
    ids: int64 [D], the token that each row of the head stands for; None: rows are tokens.
    curve: float64 [2, knots], contiguous: a token's probability, ascending, and that of its acceptance,
    linear between and constant outside; None: they are equal.
    """

    budgets: Sequence[int]
    floors: Sequence[float]
    best: int
    ids: Tensor | None
    curve: Tensor | None


@dataclass(frozen=True, slots=True)
class DraftedChain:
    """A draft: at each place the `best` likeliest tokens, best first, equal ones by lower row of the head,
    and their probabilities. The first of a place is the drafted one."""

    token_ids: Sequence[Sequence[int]]
    probabilities: Sequence[Sequence[float]]


@runtime_checkable
class DraftingRunner(LayeredRunner, Protocol):
    """A `LayeredRunner` that drafts greedily in one call."""

    def draft_chain(
        self, last: int, start: ChainStart, wish: ChainWish, states: Tensor | None = None
    ) -> list[DraftedChain]:
        """Layers 0..last-1 over the waiting tokens, norm and head for the last one of each sequence, then
        again for the likeliest token, until drafts end. `states`: float32 [slots, H], takes what comes out of
        the layers for all tokens that were run, each at its KV slot."""
        ...


StateRow = tuple[Tensor, int]
"""A row of a pass's last hidden states [N, H], looked at when a draft reads it, which most never are."""
STATE_EPS = 1e-6


def state_rows(states: Tensor) -> list[StateRow]:
    """All rows of [N, H]."""
    return [(states, row) for row in range(states.shape[0])]


def normalised(states: Tensor) -> Tensor:
    """float32 [N, H], every row divided by its root mean square: what drafts read of a target's states."""
    return states.float() * torch.rsqrt(states.float().square().mean(-1, keepdim=True) + STATE_EPS)
