"""Acceptance by kind of request: what holds for greedy answers says little of hot ones."""

from __future__ import annotations

import random

import pytest

from actors.drafting.acceptance_model import AcceptanceModel, RequestAcceptance, kind_of
from actors.drafting.interface import NESTED, TREE, SessionDraft

GREEDY, HOT = kind_of(0.0), kind_of(2.0)


def _teach(model: AcceptanceModel, kind: int, *, right: bool, times: int, tree: bool = False) -> None:
    """Requests of one draft token each, so that none is known by its own record."""
    for _ in range(times):
        request = RequestAcceptance(kind)
        draft = SessionDraft(1, 0, (5,), parents=(-1,) if tree else (), drafter=NESTED, exit_depth=4)
        if tree:
            model.proposed_tree(request, draft, TREE)
        else:
            model.proposed(request, draft, (NESTED,))
        model.emitted(request, [5 if right else 6])


def _likely(model: AcceptanceModel, kind: int, *, tree: bool = False) -> float:
    request = RequestAcceptance(kind)
    if tree:
        return model.expected_tree_survival(request, TREE, 1)[0]
    return model.survival(request, NESTED, 1)[0]


def test_kinds_are_ordered_by_temperature() -> None:
    kinds = [kind_of(t) for t in (0.0, 0.3, 0.6, 0.7, 1.0, 1.2, 1.3, 2.0)]
    assert kinds == [0, 1, 1, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("tree", [False, True])
def test_a_kind_begins_as_all_do_and_goes_its_own_way(tree: bool) -> None:
    model = AcceptanceModel()
    _teach(model, GREEDY, right=True, times=200, tree=tree)
    before = _likely(model, GREEDY, tree=tree)
    assert before > 0.8
    assert _likely(model, HOT, tree=tree) == before
    _teach(model, HOT, right=False, times=40, tree=tree)
    assert _likely(model, HOT, tree=tree) < 0.5 * before
    assert _likely(model, GREEDY, tree=tree) == pytest.approx(before, rel=0.01)
    model.reset()
    assert _likely(model, HOT, tree=tree) == _likely(model, GREEDY, tree=tree)


def test_ten_misses_are_enough_to_doubt_a_kind() -> None:
    model = AcceptanceModel()
    _teach(model, GREEDY, right=True, times=500)
    _teach(model, HOT, right=False, times=10)
    assert _likely(model, HOT) < 0.4


def test_places_that_are_not_reached_go_with_those_before_them() -> None:
    model = AcceptanceModel()
    for tokens in ((1, 2, 3),) * 300:
        request = RequestAcceptance(GREEDY)
        model.proposed(request, SessionDraft(1, 0, tokens, drafter=NESTED), (NESTED,))
        model.emitted(request, tokens)
    greedy = model.survival(RequestAcceptance(GREEDY), NESTED, 3)
    assert greedy[2] > 0.9
    _teach(model, HOT, right=False, times=12)
    first, second, third = model.survival(RequestAcceptance(HOT), NESTED, 3)
    assert first < 0.35
    assert second == pytest.approx(first**2, rel=0.1)
    assert third < 0.05
    assert model.survival(RequestAcceptance(GREEDY), NESTED, 3) == greedy


def test_of_one_kind_alone_all_is_as_it_is_overall() -> None:
    model = AcceptanceModel()
    for right in (True, False, True, True) * 20:
        _teach(model, GREEDY, right=right, times=1)
        assert _likely(model, GREEDY) == model.evidence()[NESTED][0][0]
    model.observe_exit(8, 0, True)
    model.adopt(NESTED, 8)
    assert _likely(model, GREEDY) == model.exit_evidence()[8][0][0]


def test_at_another_exit_a_kind_stays_as_much_worse_as_it_was() -> None:
    model = AcceptanceModel()
    _teach(model, GREEDY, right=True, times=400)
    _teach(model, HOT, right=False, times=60)
    overall = model.evidence()[NESTED][0][0]
    share = _likely(model, HOT) / overall
    for hit in (True, False) * 100:
        model.observe_exit(8, 0, hit)
    model.adopt(NESTED, 8)
    exits = model.exit_evidence()[8][0][0]
    assert _likely(model, HOT) == pytest.approx(share * exits)
    assert 0.0 < _likely(model, HOT) < 0.2 < exits


@pytest.mark.parametrize("alike", [True, False])
def test_own_records_count_as_far_as_requests_differ(alike: bool) -> None:
    """Of requests that are alike half of all tokens are right; of others all, or none."""
    model, rng = AcceptanceModel(), random.Random(0)
    for number in range(150):
        request = RequestAcceptance(GREEDY)
        chance = 0.5 if alike else float(number % 2)
        for _ in range(20):
            model.proposed(request, SessionDraft(1, 0, (5,), drafter=NESTED), (NESTED,))
            model.emitted(request, [5 if rng.random() < chance else 6])
    unlucky = RequestAcceptance(GREEDY)
    for _ in range(6):
        model.proposed(unlucky, SessionDraft(1, 0, (5,), drafter=NESTED), (NESTED,))
        model.emitted(unlucky, [6])
    share = model.survival(unlucky, NESTED, 1)[0] / _likely(model, GREEDY)
    assert (share > 0.8) if alike else (share < 0.6)


@pytest.mark.parametrize("confident", [True, False])
@pytest.mark.parametrize("verified", [0, 1, 2])
def test_trees_that_are_verified_in_part_are_believed_as_far_as_they_are_right(
    verified: int, confident: bool
) -> None:
    """Six tokens in a chain, each right in nine of ten cases, the first of which are verified each round. Of
    the others it is known only that nothing speaks against them."""
    model, request, rng = AcceptanceModel(), RequestAcceptance(GREEDY), random.Random(0)
    said = (0.7,) * 6 if confident else ()  # too modest, and what is said of each place is told apart
    draft = SessionDraft(
        1, 0, tuple(range(6)), parents=tuple(range(-1, 5)), drafter=NESTED, exit_depth=4, confidence=said
    )
    for _ in range(800):
        model.proposed_tree(request, draft, TREE)
        right = next((place for place in range(verified) if rng.random() > 0.9), verified)
        following = right if right < verified or rng.random() < 0.9 else 99
        model.emitted(request, [*range(right), following if right == verified else 99])
    fresh = RequestAcceptance(GREEDY)
    likely = (
        model.tree_survival(fresh, draft, TREE) if confident else model.expected_tree_survival(fresh, TREE, 6)
    )
    for place in range(verified + 1):
        assert likely[place] == pytest.approx(0.9 ** (place + 1), abs=0.08), place
    assert likely[5] > 0.15, "nothing spoke against it"
    trials = model.exit_evidence()[4][1]
    assert len(trials) == verified + 1, "what is not known is no evidence"


def test_a_tree_of_which_nothing_is_known_is_not_counted() -> None:
    model, request = AcceptanceModel(), RequestAcceptance(GREEDY)
    draft = SessionDraft(1, 0, (1, 2), parents=(-1, 0), drafter=NESTED)
    model.proposed_tree(request, draft, TREE)
    before = model.tree_survival(request, draft, TREE)
    for _ in range(100):
        model.proposed_tree(request, draft, TREE)
    assert model.tree_survival(request, draft, TREE) == before
    assert model.exit_evidence() == {}


@pytest.mark.parametrize("verified", [0, 2])
def test_of_a_drawn_draft_only_what_was_verified_counts(verified: int) -> None:
    """What the target draws itself is another token, and says nothing of one that was not verified."""
    model, request = AcceptanceModel(), RequestAcceptance(HOT)
    q = tuple(((token, 1.0),) for token in (1, 2, 3))
    model.proposed(request, SessionDraft(1, 0, (1, 2, 3), drafter=NESTED, q=q), (NESTED,))
    model.emitted(request, [*range(1, verified + 1), 9], verified)
    model.emitted(request, [9])
    assert model.evidence().get(NESTED, ((), ()))[1] == (1,) * verified


def test_a_kind_unlearns_soon_what_was_guessed_of_another_exit() -> None:
    model = AcceptanceModel()
    _teach(model, GREEDY, right=True, times=400)
    _teach(model, HOT, right=True, times=60)
    for _ in range(400):
        model.observe_exit(8, 0, True)
    model.adopt(NESTED, 8)
    assert _likely(model, HOT) > 0.8
    for _ in range(20):
        request = RequestAcceptance(HOT)
        model.proposed(request, SessionDraft(1, 0, (5,), drafter=NESTED, exit_depth=8), (NESTED,))
        model.emitted(request, [6])
    assert _likely(model, HOT) < 0.5
    assert _likely(model, GREEDY) > 0.8
