"""Drafts that were prepared while the target verified change nothing in what it emits."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from actors.drafting.draft_ahead import AheadDrafter
from actors.drafting.interface import SessionDraft, SessionOpen
from actors.drafting.local_source import LocalDraftSource
from actors.drafting.nested import NestedDrafter
from actors.drafting.prompt_lookup import PromptLookupDrafter
from actors.drafting.selector import DrafterPool
from actors.engine.messages import EngineRequest
from actors.engine.torch_engine import TorchEngine
from actors.sampling.params import SamplingParams, SpeculationParams
from tests.exactness.harness import make_engine, run, tiny_llama, torch_runner

OFF = SpeculationParams(enabled=False)
VOCAB, LAYERS = 320, 4


class AheadSource(LocalDraftSource):
    """Every session may be drafted ahead for, as on a stream of a target with other cores, which takes as
    long as there is something to prepare."""

    def __init__(self, pool: DrafterPool) -> None:
        super().__init__(pool)
        self._work = pool.work

    def open(self, session: SessionOpen) -> None:
        super().open(dataclasses.replace(session, ahead=True))

    def collect(self, wanted: Mapping[int, int], timeout_s: float) -> dict[int, SessionDraft]:
        drafts = super().collect(wanted, timeout_s)
        while self._work():
            pass
        return drafts


@pytest.fixture(scope="module")
def preparing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TorchEngine, AheadDrafter]]:
    """The draft is the model itself, exits and all: its deepest exit is always right."""
    folder: Path = tiny_llama(tmp_path_factory.mktemp("ahead"), vocab=VOCAB, layers=LAYERS)
    ahead = AheadDrafter(NestedDrafter(torch_runner(folder), (2, LAYERS)), outcomes=8, least=0.0)
    pool = DrafterPool([PromptLookupDrafter(), ahead])
    engine = make_engine(torch_runner(folder), source=AheadSource(pool))
    yield engine, ahead
    engine.close()


@pytest.mark.parametrize("drafter", ["nested", None])
@pytest.mark.parametrize("exit_depth", [None, LAYERS])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "top_p": 0.9}]
)
def test_prepared_drafts_change_nothing(
    preparing: tuple[TorchEngine, AheadDrafter],
    drafter: str | None,
    exit_depth: int | None,
    length: int,
    sampling: dict[str, float],
) -> None:
    engine, ahead = preparing
    before = ahead.ahead_counts
    rng = random.Random(length)
    wish = SpeculationParams(max_draft_tokens=length, force=True, drafter=drafter, exit_depth=exit_depth)
    batch = [
        EngineRequest(
            f"r{i}",
            tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 90))),
            SamplingParams(max_tokens=30, **({"seed": i} | sampling)),  # type: ignore[arg-type]
            wish,
        )
        for i in range(4)
    ]
    together = run(engine, batch, arrive_every=2)
    for one in batch:
        alone = run(engine, [dataclasses.replace(one, speculation=OFF)])[one.request_id]
        assert together[one.request_id].token_ids == alone.token_ids
    assert sum(r.drafted for r in together.values()) > 0
    if drafter == "nested" and exit_depth == LAYERS:
        after = ahead.ahead_counts
        assert sum(r.accepted for r in together.values()) > 0
        assert after.foreseen + after.partly > before.foreseen + before.partly
