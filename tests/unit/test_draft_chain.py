"""Drafts made in one call of the native core are what the passes one by one give."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.drafting.deferred_kv import DeferredKv
from actors.drafting.draft_load import load_draft
from actors.drafting.early_stop import EarlyStop
from actors.drafting.interface import DraftQuery, SessionDraft, SessionOpen
from actors.drafting.nested import NestedDrafter
from actors.models.load import DTypeName
from actors.models.runner import BLOCK_SIZE, ChainStart, ChainWish, DraftingRunner, RaggedBatch, state_rows
from actors.native import library
from actors.sampling.params import DraftSampling
from tests.toy_draft import STATE_WIDTH, TOY_VOCAB, toy_base, toy_draft

pytestmark = pytest.mark.skipif(not library.available(), reason="the native core is not here")
EXITS = (1, 2, 4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_base(tmp_path_factory.mktemp("base"))


def drafter_for(base: Path, artifact: Path, dtype: DTypeName, *, in_one: bool) -> NestedDrafter:
    loaded = load_draft(str(base), str(artifact), dtype=dtype, kv_blocks=64, threads=1, device="cpu")
    assert isinstance(loaded.runner, DraftingRunner)
    made = NestedDrafter(
        loaded.runner,
        loaded.exits,
        heads=loaded.heads,
        state_in=loaded.state_in,
        early_stop=EarlyStop((), 0.9),
    )
    if not in_one:
        made._kv._drafting = None
    return made


def assert_same(ours: SessionDraft, other: SessionDraft) -> None:
    assert ours.token_ids == other.token_ids
    assert ours.parents == other.parents
    assert ours.exit_depth == other.exit_depth
    assert ours.confidence == pytest.approx(other.confidence, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("reads_states", [False, True])
def test_one_call_drafts_what_single_passes_do(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, dtype: DTypeName, reads_states: bool
) -> None:
    """Over many rounds: several sessions at once or one, exits and lengths that change, trees and chains,
    verdicts that accept a part, states that arrive, and a rewind."""
    artifact = tmp_path / "draft.safetensors"
    toy_draft(artifact, base, exits=EXITS, reads_states=reads_states)
    both = [drafter_for(base, artifact, dtype, in_one=in_one) for in_one in (True, False)]
    chance, generator = random.Random(5), torch.Generator().manual_seed(2)
    lengths = {1: 5, 2: 40, 3: 71}
    for session, length in lengths.items():
        ids = tuple(chance.randrange(TOY_VOCAB) for _ in range(length))
        for drafter in both:
            drafter.open(SessionOpen(session, ids, length, DraftSampling(key=session, temperature=0.0)))
    drafted = 0
    calls: list[DeferredKv] = []
    step = DeferredKv.draft

    def counted(kv: DeferredKv, *rest: Any) -> Any:
        calls.append(kv)
        return step(kv, *rest)

    monkeypatch.setattr(DeferredKv, "draft", counted)
    for number in range(60):
        chosen = [s for s in lengths if chance.random() < 0.6] or [1]
        exit_depth = chance.choice(EXITS)
        queries = [
            DraftQuery(
                s,
                number,
                chance.randint(1, 5),
                exit_depth=exit_depth if chance.random() < 0.9 else chance.choice(EXITS),
                tree=chance.random() < 0.7,
                min_survival=chance.choice((0.0, 0.0, 1e-3)),
            )
            for s in chosen
        ]
        answers = [drafter.propose(queries) for drafter in both]
        for ours, other in zip(*answers, strict=True):
            assert_same(ours, other)
            drafted += len(ours.token_ids)
            chain = [t for i, t in enumerate(ours.token_ids) if not ours.parents or i % 7 == 0]
            accepted = chain[: chance.randint(0, len(chain))]
            new = [*accepted, chance.randrange(TOY_VOCAB)]
            states = torch.randn(len(new), STATE_WIDTH, generator=generator)
            for drafter in both:
                drafter.commit(ours.session_id, new)
                if reads_states:
                    drafter.note_states(ours.session_id, state_rows(states))
                if number % 17 == 16:
                    drafter.rewind(ours.session_id, lengths[ours.session_id])
        for drafter in both:
            while drafter.work():
                pass
    assert drafted > 300
    # Most drafts took the one call, and none where it is off.
    assert calls.count(both[0]._kv) > 25
    assert calls.count(both[1]._kv) == 0


def test_a_native_chain_is_layers_norm_and_head_again_and_again(base: Path, tmp_path: Path) -> None:
    """Two sequences of different lengths, budgets and floors, through a curve."""
    artifact = tmp_path / "draft.safetensors"
    toy_draft(artifact, base, exits=EXITS)
    loaded = load_draft(str(base), str(artifact), dtype="float32", threads=1, device="cpu")
    runner, ids = loaded.runner, loaded.heads.token_ids
    assert isinstance(runner, DraftingRunner)
    assert ids is not None
    curve = torch.tensor([[0.0, 0.5, 1.0], [0.2, 0.6, 0.9]], dtype=torch.float64)
    sequences = [[5, 6], [7, 8, 9]]
    tables = torch.tensor([[0], [1]], dtype=torch.int32)

    def batch_of(rows: list[int], texts: list[list[int]]) -> RaggedBatch:
        """Whole sequences from position 0."""
        lengths = [len(t) for t in texts]
        starts = torch.tensor([0, *lengths]).cumsum(0)
        return RaggedBatch(
            token_ids=torch.tensor([t for text in texts for t in text]),
            positions=torch.cat([torch.arange(n) for n in lengths]), query_start=starts,
            context_lens=torch.tensor(lengths), block_tables=tables[rows], logit_rows=starts[1:] - 1,
        )  # fmt: skip

    start = ChainStart(
        token_ids=[token for text in sequences for token in text],
        positions=[place for text in sequences for place in range(len(text))],
        query_start=[0, 2, 5],
        context_lens=[2, 3],
        block_tables=tables.tolist(),
        added_rows=[4],
        added=torch.linspace(-1.0, 1.0, runner.info.hidden_size)[None],
    )
    wish = ChainWish(budgets=(4, 6), floors=(0.0, 0.05), best=3, ids=ids, curve=curve)
    states = torch.zeros(runner.num_blocks * BLOCK_SIZE, runner.info.hidden_size)
    found = runner.draft_chain(2, start, wish, states)
    ends = []
    for row, text in enumerate(sequences):
        survival, places = 1.0, len(found[row].token_ids)
        for place in range(places):
            whole = batch_of([row], [text])
            embedded = runner.embed(whole.token_ids)
            if row == 1:
                embedded[2] += start.added[0]
            after = runner.run_layers(embedded, 0, 2, whole)
            torch.testing.assert_close(states[row * BLOCK_SIZE :][: len(text)], after, rtol=1e-4, atol=1e-5)
            top = runner.logits(after[-1:]).softmax(-1).topk(3, dim=-1)
            assert found[row].token_ids[place] == ids[top.indices[0]].tolist()
            assert found[row].probabilities[place] == pytest.approx(
                top.values[0].tolist(), rel=1e-4, abs=1e-7
            )
            assert survival >= wish.floors[row]
            survival *= float(np.interp(float(top.values[0, 0]), curve[0].numpy(), curve[1].numpy()))
            text = [*text, int(ids[top.indices[0, 0]])]
        # What came last was not run, nor was what the other sequence left alone.
        used = len(sequences[row]) + places - 1
        assert states[row * BLOCK_SIZE + used : (row + 1) * BLOCK_SIZE].abs().max() == 0.0
        ends.append((places, survival))
    assert ends[0][0] == 4
    assert 1 < ends[1][0] < 6
    assert ends[1][1] < 0.05
    wishes: tuple[dict[str, Any], ...] = ({"best": 0}, {"best": 33}, {"budgets": (0, 1)}, {"floors": (0.0,)})
    for changes in wishes:
        with pytest.raises(ValueError, match=r"range|at least 1"):
            runner.draft_chain(2, start, replace(wish, **changes))
    starts: tuple[dict[str, Any], ...] = (
        {"token_ids": [5, TOY_VOCAB, 7, 8, 9]},
        {"positions": [0]},
        {"block_tables": [[0], [1, 2]]},
        {"added_rows": [5]},
        {"added_rows": []},
    )
    for changes in starts:
        with pytest.raises(ValueError, match=r"vocabulary|fit|added|outside"):
            runner.draft_chain(2, replace(start, **changes), wish)
    with pytest.raises(ValueError, match="states"):
        runner.draft_chain(2, start, wish, states[1:])
