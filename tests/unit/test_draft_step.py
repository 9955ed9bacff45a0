"""A position drafted in one call of the native core is what the passes one by one give."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.drafting.deferred_kv import DeferredKv
from actors.drafting.draft_load import load_draft
from actors.drafting.early_stop import EarlyStop
from actors.drafting.interface import DraftQuery, DraftSampling, SessionDraft, SessionOpen
from actors.drafting.nested import NestedDrafter
from actors.models.runner import DraftingRunner, RaggedBatch
from actors.native import library
from tests.toy_draft import STATE_WIDTH, TOY_VOCAB, toy_base, toy_draft

pytestmark = pytest.mark.skipif(not library.available(), reason="the native core is not here")
EXITS = (1, 2, 4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_base(tmp_path_factory.mktemp("base"))


def drafter_for(base: Path, artifact: Path, dtype: str, *, in_one: bool) -> NestedDrafter:
    loaded = load_draft(str(base), str(artifact), dtype=dtype, kv_blocks=64, threads=1, device="cpu")  # type: ignore[arg-type]
    assert isinstance(loaded.runner, DraftingRunner)
    made = NestedDrafter(
        loaded.runner,
        loaded.exits,
        heads=loaded.heads,
        state_in=loaded.state_in,
        early_stop=EarlyStop((), 0.9),
    )
    made._kv._drafts_in_one = in_one
    return made


def assert_same(ours: SessionDraft, other: SessionDraft) -> None:
    assert ours.token_ids == other.token_ids
    assert ours.parents == other.parents
    assert ours.exit_depth == other.exit_depth
    assert ours.confidence == pytest.approx(other.confidence, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("reads_states", [False, True])
def test_one_call_drafts_what_single_passes_do(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, reads_states: bool
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

    def counted(kv: DeferredKv, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
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
                    drafter.note_states(ours.session_id, states)
                if number % 17 == 16:
                    drafter.rewind(ours.session_id, lengths[ours.session_id])
        for drafter in both:
            while drafter.work():
                pass
    assert drafted > 300
    # Most positions took the one call, and none where it is off.
    assert calls.count(both[0]._kv) > 60
    assert calls.count(both[1]._kv) == 0


def test_the_native_step_is_layers_norm_and_head(base: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "draft.safetensors"
    toy_draft(artifact, base, exits=EXITS)
    runner = load_draft(str(base), str(artifact), dtype="float32", threads=1, device="cpu").runner
    assert isinstance(runner, DraftingRunner)
    ids = torch.tensor([5, 6, 7, 8, 9])
    batch = RaggedBatch(
        token_ids=ids, positions=torch.tensor([0, 1, 0, 1, 2]), query_start=torch.tensor([0, 2, 5]),
        context_lens=torch.tensor([2, 3]), block_tables=torch.tensor([[0], [1]], dtype=torch.int32),
        logit_rows=torch.tensor([1, 4]),
    )  # fmt: skip
    hidden = runner.run_layers(runner.embed(ids), 0, 2, batch)
    logits = runner.logits(hidden[batch.logit_rows])
    changed = runner.embed(ids)
    rows, shares = runner.draft_step(changed, 0, 2, batch, 4)
    assert torch.equal(changed, hidden)
    expected = logits.softmax(-1).topk(4, dim=-1)
    assert torch.equal(rows, expected.indices)
    torch.testing.assert_close(shares, expected.values, rtol=1e-4, atol=1e-7)
    for best in (0, 33):
        with pytest.raises(ValueError, match="range"):
            runner.draft_step(runner.embed(ids), 0, 2, batch, best)
