"""Batches: all wait for whoever asks, so probes come one at a time, seldom, and rounds between them rest."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.costs import CostModel
from actors.drafting.interface import SessionDraft
from actors.engine.controller import Candidate, Controller, ControlState

DRAFT = SessionDraft(1, 1, (1, 2, 3, 4), drafter="d")


def _controller(row_ms: float, wait_ms: float = 1.0) -> Controller:
    costs = CostModel()
    for rows in (1, 2, 4, 8, 16, 32, 64):
        costs.observe(rows, (10.0 + row_ms * rows) / 1e3)
    controller = Controller(costs)
    for _ in range(100):
        controller.observe_wait(wait_ms / 1e3)
    return controller


def _score(controller: Controller, state: ControlState, right: bool) -> None:
    controller.acceptance.proposed(state.acceptance, DRAFT, ("d",))
    controller.acceptance.emitted(state.acceptance, [1, 2, 3, 4, 9] if right else [9])


def _candidates(states: list[ControlState]) -> list[Candidate]:
    return [Candidate(state, 4, ("d",)) for state in states]


def _round(controller: Controller, states: list[ControlState], right: bool, prompt_rows: int = 0) -> int:
    """One round; how many asked in it."""
    candidates = _candidates(states)
    budgets = controller.plan(candidates, prompt_rows)
    asked = [c for c, budget in zip(candidates, budgets, strict=True) if budget]
    if asked:
        controller.observe_wait(1e-3, len(asked))
        controller.trim([(c, DRAFT, 4) for c in asked], len(states), len(states))
        for candidate in asked:
            _score(controller, candidate.state, right)
            controller.observe_accepted(4 if right else 0)
    return len(asked)


def _taught(requests: int, row_ms: float = 20.0) -> tuple[Controller, list[ControlState]]:
    """A controller that knows that drafts do not pay."""
    controller, states = _controller(row_ms), [ControlState() for _ in range(requests)]
    for _ in range(10):
        for state in states:
            _score(controller, state, right=False)
    return controller, states


def test_one_of_a_batch_probes_at_a_time() -> None:
    controller, states = _taught(8)
    asked = [_round(controller, states, right=False) for _ in range(400)]
    assert set(asked) == {0, 1}
    probes = [at for at, count in enumerate(asked) if count]
    distances = [later - earlier for earlier, later in pairwise(probes)]
    assert min(distances) >= 2
    assert all(state.rounds_since_asked < 400 for state in states), "each has had its turn"


def test_a_batch_probes_in_a_small_share_of_its_time() -> None:
    one, many = _taught(1, row_ms=0.1), _taught(16, row_ms=0.1)
    lone = sum(_round(*one, right=False) for _ in range(200))
    shared = sum(_round(*many, right=False) for _ in range(200))
    assert 0 < shared < 16 * lone / 4, "each of sixteen probes more seldom than one alone would"
    round_s = many[0].costs.seconds(16)
    assert shared * 1e-3 < 0.01 * 200 * round_s


@pytest.mark.parametrize("right", [False, True])
def test_a_batch_that_knows_nothing_yet_asks_for_one_draft_after_the_other(right: bool) -> None:
    controller, states = _controller(row_ms=0.1), [ControlState() for _ in range(6)]
    for _ in range(60):
        controller.observe_wait(1e-3, 6)
    asked = [_round(controller, states, right) for _ in range(8)]
    if right:
        assert asked == [1, 1, 1, 1, 6, 6, 6, 6]
    else:
        assert asked[0] == 1
        assert max(asked) == 1, "six wrong drafts at once are not needed to know"


def test_probes_keep_back_while_prompts_are_computed() -> None:
    controller, states = _taught(2)
    assert [_round(controller, states, right=False, prompt_rows=100) for _ in range(12)] == [0] * 12
    assert sum(_round(controller, states, right=False) for _ in range(12)) > 0
    controller, states = _taught(2)
    assert sum(_round(controller, states, right=False, prompt_rows=100) for _ in range(60)) > 0, (
        "not for ever"
    )


@settings(max_examples=100, deadline=None)
@given(
    waited=st.lists(st.tuples(st.integers(0, 40), st.sampled_from([4, 8, 16])), min_size=2, max_size=6),
    to_look=st.integers(0, 7),
    to_probe=st.integers(-1, 8),
    in_debt=st.booleans(),
    prompt_rows=st.sampled_from([0, 50]),
)
def test_rounds_that_rest_are_those_in_which_planning_asks_nobody(
    waited: list[tuple[int, int]], to_look: int, to_probe: int, in_debt: bool, prompt_rows: int
) -> None:
    """And they leave the same behind."""

    def made() -> tuple[Controller, list[ControlState]]:
        controller, states = _taught(len(waited))
        round_s = controller.costs.seconds(len(states) + prompt_rows)
        controller.account.round(round_s)
        controller.account.balance_s = -round_s if in_debt else 0.0
        controller._rounds_to_look, controller._rounds_to_probe = to_look, to_probe
        for state, (rounds, interval) in zip(states, waited, strict=True):
            state.rounds_since_asked, state.probe_interval = rounds, interval
        return controller, states

    resting, rested = made()
    planning, planned = made()
    rounds = resting.rests(rested, prompt_rows)
    assert 0 <= rounds <= 4
    resting.rested(rested, rounds)
    for _ in range(rounds):
        assert not any(planning.plan(_candidates(planned), prompt_rows))
    assert [s.rounds_since_asked for s in rested] == [s.rounds_since_asked for s in planned]
    if rounds and not prompt_rows:
        assert resting.account.balance_s == pytest.approx(planning.account.balance_s)
    if rounds and not in_debt:
        assert resting._rounds_to_look == planning._rounds_to_look
        assert resting._rounds_to_probe == planning._rounds_to_probe
    if rounds == 0:
        least = 4 if prompt_rows else 1
        due = any(waits >= least * interval for waits, interval in waited)
        assert to_look == 0 or (to_probe <= 1 and due), "there is something to decide"


def test_pauses_of_a_larger_batch_do_not_outlive_it() -> None:
    controller, states = _taught(16, row_ms=0.1)
    for _ in range(80):
        _round(controller, states, right=False)
    controller._rounds_to_look, controller._rounds_to_probe = 15, 64
    last = states[:1]
    assert sum(_round(controller, last, right=False) for _ in range(6)) > 0


def _trial(together_ms: float) -> list[int]:
    """How many of four ask, round by round. Alone each waits 4 ms, together `together_ms`."""
    controller, states = _controller(row_ms=0.1, wait_ms=4.0), [ControlState(asked=True) for _ in range(4)]
    controller._drafts_seen = 100
    for state in states:
        for _ in range(10):
            controller.acceptance.proposed(state.acceptance, DRAFT, ("d",))
            controller.acceptance.emitted(state.acceptance, [1, 9])
    asked = []
    for _ in range(6):
        candidates = _candidates(states)
        budgets = controller.plan(candidates)
        asked.append(sum(budget > 0 for budget in budgets))
        if asked[-1]:
            controller.observe_wait(together_ms / 1e3, asked[-1])
    return asked


def test_so_many_as_never_asked_together_are_tried_once() -> None:
    """What four wait is not four times what one waits where they are drafted for together."""
    assert _trial(together_ms=4.5) == [4] * 6
    tried, *later = _trial(together_ms=16.0)
    assert tried == 4
    assert max(later) <= 1


def test_a_first_draft_says_nothing_of_how_long_drafts_take() -> None:
    """It waits for the prompt to be read, too."""
    controller, state = _controller(row_ms=0.1), ControlState()
    candidate = Candidate(state, 4, ("d",))
    for expected in (1.0, 3.0):
        while not controller.plan([candidate])[0]:
            pass
        controller.observe_wait(3e-3)
        controller.trim([(candidate, DRAFT, 4)], 1, 1)
        assert (controller._waits.mean_s > 1.1e-3) == (expected > 1.0)


def test_what_a_drafter_reads_first_is_not_what_drafts_take() -> None:
    """Who has not asked for long waits until the drafter has read what came since. That is the price of a
    probe, not of going on."""
    controller = _controller(row_ms=0.1)
    controller.reads_in_rounds = True
    states = [ControlState(asked=True) for _ in range(4)]
    candidates = _candidates(states)
    controller._drafts_seen = 100
    for state in states:
        state.rounds_since_asked = 50
        for _ in range(10):
            _score(controller, state, right=True)
    assert all(controller.plan(candidates)), "so many have not asked together yet: it is tried"
    controller.observe_wait(20e-3, 4)
    assert all(controller.plan(candidates))
    controller.observe_wait(1.5e-3, 4)
    assert controller.table(())["wait_ms_by_requests"] == {"1": {"1": 1.0}, "4": {"4": 1.5}}


def test_probes_are_as_seldom_as_what_they_read_is_long() -> None:
    pauses = []
    for read_ms in (2.0, 12.0):
        controller, states = _taught(4)
        controller.reads_in_rounds = True
        asked: list[int] = []
        for number in range(600):
            budgets = controller.plan(_candidates(states))
            if any(budgets):
                asked.append(number)
                controller.observe_wait(read_ms / 1e3, 1)
                drafts = [(c, DRAFT, 4) for c, b in zip(_candidates(states), budgets, strict=True) if b]
                controller.trim(drafts, 4, 4)
        pauses.append(asked[-1] - asked[-2])
    assert pauses[1] > 1.4 * pauses[0], pauses


@pytest.mark.parametrize(("requests", "asked"), [(1, 4), (2, 1)])
def test_a_batch_asks_for_what_pays_and_who_is_alone_for_all(requests: int, asked: int) -> None:
    """Only the first of four tokens is ever right."""
    controller = _controller(row_ms=0.5)
    states = [ControlState(asked=True) for _ in range(requests)]
    controller._drafts_seen = 100
    for state in states:
        for _ in range(40):
            controller.acceptance.proposed(state.acceptance, DRAFT, ("d",))
            controller.acceptance.emitted(state.acceptance, [1, 9])
    assert controller.plan(_candidates(states)) == [asked] * requests
    trees = [Candidate(state, 4, ("d",), tree=True) for state in states]
    for state in states:
        for _ in range(40):
            controller.acceptance.proposed_tree(state.acceptance, replace(DRAFT, parents=(-1, 0, 1, 2)), "d")
            controller.acceptance.emitted(state.acceptance, [1, 9])
    assert controller.plan(trees) == [4] * requests, "tokens of a tree stand side by side"
