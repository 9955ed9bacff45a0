"""Ragged attention over a paged KV pool, in plain torch, on CPU and CUDA.

A plan is made once a pass from the batch: where each token's KV goes, and which queries are computed
together. Sequences with few queries (decoding, verification) share one masked call; long chunks go one by
one, in slices whose score matrix is bounded. Query heads that share a KV head are extra rows of one product,
so that keys and values are never repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.models.runner import BLOCK_SIZE, RaggedBatch

SHORT_QUERIES = 16
"""Sequences with up to this many tokens in a pass are computed together."""
MAX_SCORES = 1 << 22
"""Queries times keys of one call, at most (one query alone may exceed it)."""


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What a layer asks of attention besides causality.

    scale multiplies the scores. window: a query sees the last `window` positions, itself included. softcap:
    scores become softcap * tanh(score / softcap) (Gemma 2). sinks: [heads], a score per head that takes part
    in the softmax and adds nothing (gpt-oss).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(slots=True)
class QueryGroup:
    """Queries computed in one call: R sequences, Q queries each (short ones padded with their last query).

    rows: [R, Q] packed index of each query. blocks: [R, B]. length: S, KV entries of the longest sequence.
    query_pos: [R, Q] position of each query; key_pos: [R, S] or [1, S] position of each KV entry; visible:
    bool [R, Q, S]: these three stay on the host. scatter: packed indices and flat (r * Q + q) indices of the
    queries that are not padding; None when the rows are one contiguous range starting at `start`.
    """

    rows: Tensor
    blocks: Tensor
    length: int
    query_pos: Tensor
    key_pos: Tensor
    visible: Tensor
    start: int | None
    scatter: tuple[Tensor, Tensor] | None
    masks: dict[tuple[int | None, int], Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None, repeat: int) -> Tensor | None:
        """bool [R, 1, Q * repeat, S], each query's row `repeat` times, or None when nothing is hidden; kept
        for the other layers of the pass."""
        key = (window, repeat)
        if key not in self.masks:
            seen = self.visible
            if window is not None:
                seen = seen & (self.query_pos[:, :, None] - self.key_pos[:, None, :] < window)
            self.masks[key] = (
                None
                if bool(seen.all())
                else seen.repeat_interleave(repeat, dim=1).unsqueeze(1).to(self.rows.device)
            )
        return self.masks[key]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """slots: int64 [T], flat KV slot of each token of the pass."""

    slots: Tensor
    groups: tuple[QueryGroup, ...]


@dataclass(frozen=True, slots=True)
class _Span:
    """Queries first..last-1 (packed) of sequence `seq`, whose last sees `length` KV entries."""

    seq: int
    first: int
    last: int
    length: int

    @property
    def queries(self) -> int:
        return self.last - self.first


def plan_attention(batch: RaggedBatch, device: torch.device) -> AttentionPlan:
    """Group the queries of a pass. Raises ValueError on a batch whose lengths contradict each other."""
    starts: list[int] = batch.query_start.tolist()
    lengths: list[int] = batch.context_lens.tolist()
    counts = torch.tensor([b - a for a, b in pairwise(starts)], dtype=torch.int64)
    if starts[0] != 0 or starts[-1] != batch.num_tokens or bool((counts < 0).any()):
        raise ValueError("query_start must ascend from 0 to the number of tokens")
    tables = batch.block_tables.to("cpu", torch.int64)
    context = torch.tensor(lengths, dtype=torch.int64)
    if bool((context < counts).any()) or bool((context > tables.shape[1] * BLOCK_SIZE).any()):
        raise ValueError("context_lens must cover the tokens of the pass and fit the block tables")

    seq_of = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    ends = torch.tensor(starts[1:], dtype=torch.int64)
    entries = context[seq_of] - (ends[seq_of] - torch.arange(batch.num_tokens))
    slots = tables[seq_of, entries // BLOCK_SIZE] * BLOCK_SIZE + entries % BLOCK_SIZE

    positions = None if batch.parents is None else batch.positions.to("cpu")
    parents: list[int] | None = None if batch.parents is None else batch.parents.tolist()
    spans = _spans(starts, lengths, whole=parents is not None)
    groups = tuple(
        _make_group(spans_of, tables, entries, starts, lengths, parents, positions, device)
        for spans_of in _batched(spans)
    )
    return AttentionPlan(slots.to(device), groups)


def _spans(starts: list[int], lengths: list[int], *, whole: bool) -> list[_Span]:
    """Cut each sequence's queries so that queries * keys stays below MAX_SCORES. `whole` (trees) forbids
    cuts."""
    spans = []
    for seq, length in enumerate(lengths):
        first, end = starts[seq], starts[seq + 1]
        step = end - first if whole else max(1, MAX_SCORES // max(length, 1))
        for low in range(first, end, max(step, 1)):
            high = min(low + step, end)
            spans.append(_Span(seq, low, high, length - (end - high)))
    return spans


def _batched(spans: list[_Span]) -> Iterator[list[_Span]]:
    """Short spans of similar length together, long ones alone."""
    short = sorted((s for s in spans if s.queries <= SHORT_QUERIES), key=lambda s: (s.length, s.first))
    group: list[_Span] = []
    queries = 0
    for span in short:
        wider = max(queries, span.queries)
        # Padding to the longest context must not more than double the work of the shortest.
        fits = group and span.length <= max(2 * group[0].length, 8 * BLOCK_SIZE)
        if group and not (fits and (len(group) + 1) * wider * span.length <= MAX_SCORES):
            yield group
            group, wider = [], span.queries
        group.append(span)
        queries = wider
    if group:
        yield group
    for span in spans:
        if span.queries > SHORT_QUERIES:
            yield [span]


def _make_group(
    spans: list[_Span],
    tables: Tensor,
    entries: Tensor,
    starts: list[int],
    lengths: list[int],
    parents: list[int] | None,
    positions: Tensor | None,
    device: torch.device,
) -> QueryGroup:
    spans = sorted(spans, key=lambda s: s.first)
    queries = max(s.queries for s in spans)
    length = max(s.length for s in spans)
    rows = torch.tensor(
        [[min(s.first + q, s.last - 1) for q in range(queries)] for s in spans], dtype=torch.int64
    )
    seqs = torch.tensor([s.seq for s in spans], dtype=torch.int64)
    blocks = tables[seqs, : -(-length // BLOCK_SIZE)]
    query_entry = entries[rows]
    key_entry = torch.arange(length)
    visible = key_entry[None, None, :] <= query_entry[:, :, None]
    query_pos, key_pos = query_entry, key_entry[None, :]
    if parents is not None and positions is not None:
        query_pos = positions[rows]
        key_pos = key_pos.repeat(len(spans), 1)
        for index, span in enumerate(spans):
            first, end = starts[span.seq], starts[span.seq + 1]
            base = lengths[span.seq] - (end - first)
            ancestors = _ancestors(parents, first, end)
            key_pos[index, base : base + end - first] = positions[first:end]
            visible[index, :, base : base + end - first] = ancestors[rows[index] - first]

    contiguous = all(s.queries == queries for s in spans) and all(
        a.last == b.first for a, b in pairwise(spans)
    )
    scatter = None
    if not contiguous:
        packed = torch.cat([torch.arange(s.first, s.last) for s in spans])
        flat = torch.cat([torch.arange(s.queries) + i * queries for i, s in enumerate(spans)])
        scatter = (packed.to(device), flat.to(device))
    return QueryGroup(
        rows=rows.to(device),
        blocks=blocks.to(device),
        length=length,
        query_pos=query_pos,
        key_pos=key_pos,
        visible=visible,
        start=spans[0].first if contiguous else None,
        scatter=scatter,
    )


def _ancestors(parents: list[int], first: int, end: int) -> Tensor:
    """bool [n, n] for tokens first..end-1: row t marks t and its ancestors. Parents must precede children."""
    marks = torch.eye(end - first, dtype=torch.bool)
    for token in range(first, end):
        parent = parents[token]
        if parent == -1:
            continue
        if not first <= parent < token:
            raise ValueError(f"parent {parent} of token {token} is not an earlier token of its sequence")
        marks[token - first] |= marks[parent - first]
    return marks


def attend(
    plan: AttentionPlan, query: Tensor, keys: Tensor, values: Tensor, options: AttentionOptions
) -> Tensor:
    """Attention of one layer, whose new keys and values are already in the pool.

    query: [T, heads, D]; keys: [blocks, BLOCK_SIZE, kv_heads, D]; values: the same with their own D.
    Returns [T, heads, D of values] in the query's dtype. Scores are computed in the query's dtype, so float32
    queries over a bfloat16 pool are exact up to the pool's rounding.
    """
    heads, kv_heads = query.shape[1], keys.shape[2]
    out = query.new_empty((query.shape[0], heads, values.shape[-1]))
    for group in plan.groups:
        count, queries = group.rows.shape
        size = count * queries
        picked = (
            query[group.start : group.start + size] if group.start is not None else query[group.rows.view(-1)]
        )
        # [R, kv_heads, Q * heads per KV head, D]: the queries of a KV head's group are rows of one product.
        q = picked.view(count, queries, kv_heads, heads // kv_heads, -1).transpose(1, 2).flatten(2, 3)
        k = _gather(keys, group, query.dtype)
        v = _gather(values, group, query.dtype)
        result = _scores(q, k, v, group.mask(options.window, heads // kv_heads), options)
        result = (
            result.view(count, kv_heads, queries, heads // kv_heads, -1)
            .transpose(1, 2)
            .reshape(size, heads, -1)
        )
        if group.start is not None:
            out[group.start : group.start + size] = result
        elif group.scatter is not None:
            out[group.scatter[0]] = result[group.scatter[1]]
    return out


def _gather(pool: Tensor, group: QueryGroup, dtype: torch.dtype) -> Tensor:
    """Pool entries of the group's sequences: [R, kv_heads, S, D]."""
    count, blocks = group.blocks.shape
    rows = pool.index_select(0, group.blocks.view(-1))
    picked = rows.view(count, blocks * BLOCK_SIZE, *pool.shape[2:])[:, : group.length]
    return picked.transpose(1, 2).to(dtype)


def _scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: AttentionOptions) -> Tensor:
    if options.softcap is None and options.sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=options.scale)
    scores = torch.matmul(q, k.transpose(2, 3)).float() * options.scale
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if options.sinks is None:
        return torch.matmul(scores.softmax(-1).to(v.dtype), v)
    kv_heads, rows = scores.shape[1], scores.shape[2]
    per_head = options.sinks.float().view(kv_heads, -1)
    sinks = (
        per_head.repeat(1, rows // per_head.shape[1])
        .view(1, kv_heads, rows, 1)
        .expand(scores.shape[0], -1, -1, 1)
    )
    weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    return torch.matmul(weights.to(v.dtype), v)
