"""Paged attention against a dense reference, one query at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.models import attention
from actors.models.attention import AttentionOptions, attend, plan_attention
from actors.models.runner import BLOCK_SIZE, RaggedBatch

HEADS, KV_HEADS, DIM, VALUE_DIM, BLOCKS = 6, 2, 8, 4, 40


def make_batch(shape: list[tuple[int, int]], seed: int = 0) -> RaggedBatch:
    """shape: (entries before, new tokens) of each sequence."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randperm(BLOCKS, generator=generator).int()
    width = max(-(-(before + new) // BLOCK_SIZE) for before, new in shape)
    tables = torch.zeros(len(shape), width, dtype=torch.int32)
    used = 0
    for row, (before, new) in enumerate(shape):
        need = -(-(before + new) // BLOCK_SIZE)
        tables[row, :need] = blocks[used : used + need]
        used += need
    sizes = torch.tensor([new for _, new in shape])
    total = int(sizes.sum())
    return RaggedBatch(
        token_ids=torch.zeros(total, dtype=torch.int64),
        positions=torch.cat([torch.arange(before, before + new) for before, new in shape]),
        query_start=torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]),
        context_lens=torch.tensor([before + new for before, new in shape]),
        block_tables=tables,
        logit_rows=torch.arange(total),
    )


def tensors(batch: RaggedBatch, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch.num_tokens, HEADS, DIM, generator=generator),
        torch.randn(BLOCKS, BLOCK_SIZE, KV_HEADS, DIM, generator=generator),
        torch.randn(BLOCKS, BLOCK_SIZE, KV_HEADS, VALUE_DIM, generator=generator),
    )


def dense(
    batch: RaggedBatch,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    """The definition, straight from `RaggedBatch`'s words."""
    out = torch.zeros(batch.num_tokens, HEADS, VALUE_DIM)
    for r in range(batch.num_seqs):
        start, end = int(batch.query_start[r]), int(batch.query_start[r + 1])
        context = int(batch.context_lens[r])
        slots = [
            int(batch.block_tables[r, e // BLOCK_SIZE]) * BLOCK_SIZE + e % BLOCK_SIZE for e in range(context)
        ]
        base = context - (end - start)
        position = [*range(base), *batch.positions[start:end].tolist()]
        for t in range(start, end):
            if batch.parents is None:
                seen = list(range(context - (end - t) + 1))
            else:
                chain, at = [], t
                while at >= 0:
                    chain.append(base + at - start)
                    at = int(batch.parents[at])
                seen = [*range(base), *sorted(chain)]
            if options.window is not None:
                seen = [e for e in seen if int(batch.positions[t]) - position[e] < options.window]
            picked = [slots[e] for e in seen]
            group = torch.arange(HEADS) // (HEADS // KV_HEADS)
            k, v = keys.flatten(0, 1)[picked][:, group], values.flatten(0, 1)[picked][:, group]
            scores = (k * query[t]).sum(-1) * options.scale
            if options.softcap is not None:
                scores = options.softcap * torch.tanh(scores / options.softcap)
            if options.sinks is not None:
                scores = torch.cat([scores, options.sinks[None]])
            weights = scores.softmax(0)[: len(picked)]
            out[t] = (weights[:, :, None] * v).sum(0)
    return out


PLAIN = AttentionOptions(scale=DIM**-0.5)
OPTIONS = {
    "plain": PLAIN,
    "window": AttentionOptions(scale=0.3, window=5),
    "softcap": AttentionOptions(scale=1.0, softcap=1.5),
    "sinks": AttentionOptions(scale=0.5, window=40, sinks=torch.linspace(-1, 2, HEADS)),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@settings(max_examples=10, deadline=None)
@given(shape=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 30)), min_size=1, max_size=4))
def test_equals_the_definition(options: AttentionOptions, shape: list[tuple[int, int]]) -> None:
    batch = make_batch(shape)
    query, keys, values = tensors(batch)
    ours = attend(plan_attention(batch, query.device), query, keys, values, options)
    torch.testing.assert_close(ours, dense(batch, query, keys, values, options), atol=1e-5, rtol=1e-5)


def test_slicing_by_score_budget_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch([(100, 30), (3, 64), (60, 1), (61, 1)])
    query, keys, values = tensors(batch)
    whole = attend(plan_attention(batch, query.device), query, keys, values, PLAIN)
    monkeypatch.setattr(attention, "MAX_SCORES", 300)
    plan = plan_attention(batch, query.device)
    assert len(plan.groups) > 20
    assert all(g.rows.numel() * g.length <= 300 for g in plan.groups)
    torch.testing.assert_close(attend(plan, query, keys, values, PLAIN), whole, atol=1e-6, rtol=1e-5)


def test_decoding_sequences_of_like_length_share_a_call() -> None:
    plan = plan_attention(make_batch([(100 + i, 1 + i % 3) for i in range(8)]), torch.device("cpu"))
    assert len(plan.groups) == 1
    long_and_short = plan_attention(make_batch([(900, 1), (10, 1), (12, 1)]), torch.device("cpu"))
    assert sorted(g.length for g in long_and_short.groups) == [13, 901]


@settings(max_examples=25, deadline=None)
@given(data=st.data(), window=st.one_of(st.none(), st.integers(1, 40)))
def test_trees_see_their_ancestors_only(data: st.DataObject, window: int | None) -> None:
    shape = data.draw(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), min_size=1, max_size=3))
    batch = make_batch(shape)
    parents: list[int] = []
    positions: list[int] = []
    for before, new in shape:
        first = len(parents)
        for t in range(first, first + new):
            parent = data.draw(st.integers(first - 1, t - 1))
            parents.append(-1 if parent < first else parent)
            positions.append(before if parent < first else positions[parent] + 1)
    batch.parents, batch.positions = torch.tensor(parents), torch.tensor(positions)
    query, keys, values = tensors(batch)
    options = AttentionOptions(scale=0.4, window=window)
    ours = attend(plan_attention(batch, query.device), query, keys, values, options)
    torch.testing.assert_close(ours, dense(batch, query, keys, values, options), atol=1e-5, rtol=1e-5)


def test_slots_follow_the_block_table() -> None:
    batch = make_batch([(BLOCK_SIZE - 2, 4), (0, 2)])
    slots = plan_attention(batch, torch.device("cpu")).slots.tolist()
    table = batch.block_tables
    assert slots == [
        int(table[0, 0]) * BLOCK_SIZE + BLOCK_SIZE - 2, int(table[0, 0]) * BLOCK_SIZE + BLOCK_SIZE - 1,
        int(table[0, 1]) * BLOCK_SIZE, int(table[0, 1]) * BLOCK_SIZE + 1,
        int(table[1, 0]) * BLOCK_SIZE, int(table[1, 0]) * BLOCK_SIZE + 1,
    ]  # fmt: skip


def test_contradictory_batches_are_refused() -> None:
    cpu = torch.device("cpu")
    batch = make_batch([(3, 2), (4, 1)])
    batch.context_lens = torch.tensor([1, 5])
    with pytest.raises(ValueError, match="context_lens"):
        plan_attention(batch, cpu)
    batch.context_lens = torch.tensor([5, BLOCK_SIZE + 1])
    with pytest.raises(ValueError, match="block tables"):
        plan_attention(batch, cpu)
    batch = make_batch([(3, 2), (4, 1)])
    batch.query_start = torch.tensor([0, 2, 4])
    with pytest.raises(ValueError, match="query_start"):
        plan_attention(batch, cpu)
    batch = make_batch([(3, 2), (4, 1)])
    batch.parents = torch.tensor([-1, 0, 1])  # of another sequence
    with pytest.raises(ValueError, match="parent 1 of token 2"):
        plan_attention(batch, cpu)


def test_stale_slots_never_leak() -> None:
    """Entries past a sequence's length, and blocks of others, may hold anything finite."""
    batch = make_batch([(5, 1), (40, 2)])
    query, keys, values = tensors(batch)
    plan = plan_attention(batch, query.device)
    before = attend(plan, query, keys, values, PLAIN)
    used = torch.zeros(BLOCKS * BLOCK_SIZE, dtype=torch.bool)
    for r in range(2):
        for e in range(int(batch.context_lens[r])):
            used[int(batch.block_tables[r, e // BLOCK_SIZE]) * BLOCK_SIZE + e % BLOCK_SIZE] = True
    keys.flatten(0, 1)[~used] = 1e4
    values.flatten(0, 1)[~used] = -1e4
    assert torch.equal(attend(plan, query, keys, values, PLAIN), before)
    assert math.isfinite(float(before.sum()))
