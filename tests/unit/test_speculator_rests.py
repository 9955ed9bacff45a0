"""What sequences tell their source, and when: rounds in which a batch rests, waits, what is held back."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from collections.abc import Sequence as Seq

import pytest
import torch

from actors.costs import CostModel
from actors.drafting import local_source
from actors.drafting.assignment import DraftAssignment
from actors.drafting.interface import SessionDraft, SessionOpen, SessionUpdate
from actors.drafting.local_source import LocalDraftSource
from actors.drafting.prompt_lookup import PromptLookupDrafter
from actors.drafting.selector import DrafterPool
from actors.drafting.token_recycling import TokenRecyclingDrafter
from actors.engine import speculator as speculator_module
from actors.engine.controller import Candidate, Controller
from actors.engine.messages import EngineRequest
from actors.engine.sequence import Sequence, Work
from actors.engine.speculator import DraftTimeouts, Speculator
from actors.models.runner import StateRow
from actors.sampling.params import DraftSampling, SamplingParams, SpeculationParams
from actors.verification.registry import get_rule

_ids = itertools.count()
ROUND_S, FORCED_S = 0.1, 1.0


def _sequence(force: bool = False, tree: bool | None = None, trees: bool = False) -> Sequence:
    request = EngineRequest(
        f"r{next(_ids)}",
        tuple(range(10)),
        SamplingParams(temperature=0.0, max_tokens=1000),
        SpeculationParams(max_draft_tokens=4, force=force, tree=tree),
    )
    return Sequence(request, None, get_rule("coupled"), 0, 4, trees)


class _Noting(LocalDraftSource):
    """Notes what it is told, and how long it may take."""

    def __init__(self) -> None:
        super().__init__(DrafterPool([PromptLookupDrafter(), TokenRecyclingDrafter()]))
        self.updates: list[SessionUpdate] = []
        self.submit_s: list[float] = []
        self.collect_s: list[float] = []

    def submit(self, updates: Seq[SessionUpdate], timeout_s: float = 0.0) -> None:
        self.updates += updates
        self.submit_s.append(timeout_s)
        super().submit(updates, timeout_s)

    def collect(self, wanted: Mapping[int, int], timeout_s: float) -> dict[int, SessionDraft]:
        self.collect_s.append(timeout_s)
        return super().collect(wanted, timeout_s)


def _speculator(source: LocalDraftSource | None = None) -> Speculator:
    """Rows are so dear that drafting never pays."""
    costs = CostModel()
    for rows in (1, 2, 4, 8, 16):
        costs.observe(rows, 0.01 * rows)
    return Speculator(source or _Noting(), Controller(costs), DraftTimeouts(ROUND_S, FORCED_S), 4096, 100)


def _starts(speculator: Speculator, seq: Sequence) -> None:
    speculator.open(seq)
    seq.num_computed = len(seq.token_ids)


def _round(speculator: Speculator, batch: list[Sequence], token: int = 3) -> None:
    """A round of plain decoding for all."""
    speculator.collect(batch, 0)
    for seq in batch:
        seq.token_ids.append(token)
        seq.num_computed = len(seq.token_ids) - 1
        speculator.committed(seq, [token], None, 0, ())
    speculator.submit(batch, 0)


def _resting(speculator: Speculator, batch: list[Sequence]) -> None:
    for _ in range(60):
        _round(speculator, batch)
        if speculator._resting == 3:
            return
    raise AssertionError("the batch never rests")


def test_a_forced_request_that_joins_a_resting_batch_drafts_at_once() -> None:
    speculator, batch = _speculator(), [_sequence(), _sequence()]
    forced = _sequence(force=True)
    for seq in (*batch, forced):
        _starts(speculator, seq)
    forced.num_computed = 4  # its prompt is still being computed
    _resting(speculator, batch)
    forced.num_computed = len(forced.token_ids) - 1
    speculator.submit([*batch, forced], 0)
    assert forced.asked


def test_lengths_are_chosen_among_those_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    speculator, seq = _speculator(), _sequence()
    _starts(speculator, seq)
    seq.token_ids += [1, 2, 3, 1, 2]
    speculator.committed(seq, [1, 2, 3, 1, 2], None, 0, ())
    seq.num_computed = len(seq.token_ids) - 1
    monkeypatch.setattr(speculator.controller, "plan", lambda *_: [2])
    seen: list[tuple[int, int]] = []

    def trim(drafts: Seq[tuple[Candidate, SessionDraft, int]], *rows: int) -> list[int]:
        seen.extend((candidate.limit, drafted) for candidate, _, drafted in drafts)
        return [0] * len(drafts)

    monkeypatch.setattr(speculator.controller, "trim", trim)
    speculator.submit([seq], 0)
    speculator.collect([seq], 0)
    assert seen == [(2, 2)]
    assert not seq.asked


def test_a_rest_that_is_cut_short_counts_what_passed() -> None:
    speculator, batch = _speculator(), [_sequence(), _sequence(), _sequence()]
    for seq in batch:
        _starts(speculator, seq)
    _resting(speculator, batch)
    before = [seq.control.rounds_since_asked for seq in batch]
    _round(speculator, batch)
    speculator.release(batch.pop())
    _round(speculator, batch)
    counted = [seq.control.rounds_since_asked - b for seq, b in zip(batch, before, strict=False)]
    assert set(counted) <= {2, 3}, "the first round of the rest, the second, and maybe this one"


def test_a_batch_that_does_not_draft_teaches_one_row_now_and_then_a_single_request_each() -> None:
    speculator, batch = _speculator(), [_sequence() for _ in range(4)]
    for seq in batch:
        _starts(speculator, seq)
    taught: list[Sequence] = []
    for _ in range(100):
        _round(speculator, batch)
        learners = [seq for seq in batch if not seq.asked and speculator.learns_from(Work(seq, 1))]
        assert len(learners) <= 1
        taught += learners
    assert all(seq in taught for seq in batch), "each in its turn"
    assert len(taught) < 60
    alone = [_sequence()]
    _starts(speculator, alone[0])
    for _ in range(20):
        _round(speculator, alone)
        assert speculator.learns_from(Work(alone[0], 1))


def test_states_of_tokens_that_others_followed_without_are_dropped() -> None:
    seen: list[tuple[StateRow, ...]] = []

    class Watching(DrafterPool):
        def apply(self, update: SessionUpdate) -> None:
            seen.append(tuple(update.states))

    source = LocalDraftSource(Watching([PromptLookupDrafter()]))
    source.open(SessionOpen(0, (1, 2), 2, DraftSampling(1)))
    states = torch.zeros(3, 2)
    source.submit([SessionUpdate(0, 1, (3,), 2, states=[(states, 0)])])
    source.submit([SessionUpdate(0, 2, (4, 5), 2)])
    source.submit([SessionUpdate(0, 3, (6,), 2, states=[(states, 2)])])
    source.collect({0: 3}, 0.0)
    assert seen == [((states, 2),)]


def test_a_session_that_is_not_asked_for_holds_the_last_of_what_it_was_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local_source, "MAX_HELD_CANDIDATES", 2)
    monkeypatch.setattr(local_source, "MAX_HELD_STATES", 2)
    seen: list[SessionUpdate] = []

    class Watching(DrafterPool):
        def apply(self, update: SessionUpdate) -> None:
            seen.append(update)

    source = LocalDraftSource(Watching([PromptLookupDrafter()]))
    source.open(SessionOpen(0, (1, 2), 2, DraftSampling(1)))
    states = torch.zeros(5, 2)
    for n in (1, 2, 3, 4):
        source.submit([SessionUpdate(0, n, (n,), 2, candidates=((n, (9,)),), states=[(states, n)])])
    source.collect({0: 4}, 0.0)
    (told,) = seen
    assert told.new_tokens == (1, 2, 3, 4)
    assert [token for token, _ in told.candidates] == [3, 4]
    assert [row for _, row in told.states] == [3, 4]


def test_a_draft_is_scored_by_its_own_verdict_however_late_the_drafters_hear_of_it() -> None:
    """Verdicts on what others drafted in between say nothing of it: of a draft that was drawn, what was not
    verified must not be scored."""
    seen: list[tuple[tuple[int, ...], int]] = []

    class Watching(DrafterPool):
        def apply(self, update: SessionUpdate) -> None:
            seen.append((update.new_tokens, update.drafted))
            super().apply(update)

    source = LocalDraftSource(Watching([PromptLookupDrafter()]))
    source.open(SessionOpen(0, (1, 2), 2, DraftSampling(1)))
    asked = {1, 4, 5, 6}
    for epoch, drafted in enumerate((9, 1, 4, 3, 2, 0), start=1):
        source.submit([SessionUpdate(0, epoch, (epoch,), 2, drafted)])
        if epoch in asked:
            source.collect({0: epoch}, 0.0)
    assert seen == [((1,), 9), ((2, 3, 4), 1), ((5,), 2), ((6,), 0)]


def test_who_wants_no_draft_tells_its_source_of_its_tokens_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(speculator_module, "_HELD_BACK", 2)
    source, seq = _Noting(), _sequence()
    speculator = _speculator(source)
    speculator.assign(DraftAssignment(cap=0))
    _starts(speculator, seq)
    for token in range(5):
        _round(speculator, [seq], token)
    assert [(update.budget, update.new_tokens) for update in source.updates] == [(0, (0, 1)), (0, (2, 3))]


def test_a_round_waits_longer_for_drafts_where_a_request_forces_them() -> None:
    source, free, forcing = _Noting(), _sequence(), _sequence(force=True)
    speculator = _speculator(source)
    for seq in (free, forcing):
        _starts(speculator, seq)
    for _ in range(20):
        if not source.collect_s:
            _round(speculator, [free])
    assert (source.submit_s[-1], source.collect_s) == (ROUND_S, [ROUND_S])
    for _ in range(2):
        _round(speculator, [free, forcing])
    assert (source.submit_s[-1], source.collect_s[-1]) == (FORCED_S, FORCED_S)


def test_a_request_alone_is_given_trees_a_batch_chains_and_who_insists_trees() -> None:
    speculator = _speculator()
    seqs = [_sequence(force=True, trees=True), _sequence(force=True, trees=True, tree=True)]
    for seq in seqs:
        seq.token_ids[:] = [1, 4, 5, 1, 2, 3, 1]
        speculator.open(seq)
        seq.num_computed = len(seq.token_ids) - 1
    teacher, prompt = seqs[0], _sequence()
    assert not prompt.decoding
    teacher.unsent_candidates.append((1, (4, 2, 7)))
    speculator.submit(seqs[:1], 0)
    tree, _ = speculator.collect(seqs[:1], 0)[teacher]
    assert tree.parents.count(-1) > 1
    for seq in seqs:
        seq.token_ids += [2, 3, 1]
        seq.num_computed += 3
        speculator.committed(seq, [2, 3, 1], None, 0, ())
    speculator.submit(seqs, 0)
    found = speculator.collect(seqs, 0)
    assert found[teacher][0].parents == ()
    assert found[seqs[1]][0].parents
    speculator.submit([teacher, prompt], 100)
    assert not teacher.tree_now, "one whose prompt is computed waits too"
