"""Draft trees: joined from guesses, best first, cut anywhere; how their acceptance is learned."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.drafting.acceptance_model import AcceptanceModel, RequestAcceptance
from actors.drafting.interface import NESTED, TREE, DraftQuery, SessionDraft, SessionOpen, SessionUpdate
from actors.drafting.selector import DrafterPool
from actors.drafting.token_recycling import TokenRecyclingDrafter
from actors.drafting.tree import best_chain, depths, grow, parents_of, reach
from actors.drafting.tree_acceptance import TreeRecord
from actors.sampling.params import MAX_DRAFT_TOKENS, DraftSampling
from actors.verification.coupled import accept_path


def chain(tokens: Sequence[int], confidence: float, drafter: str = "a") -> SessionDraft:
    return SessionDraft(1, 1, tuple(tokens), drafter=drafter, confidence=(confidence,) * len(tokens))


def tree(tokens: Sequence[int], parents: Sequence[int], confidence: Sequence[float]) -> SessionDraft:
    return SessionDraft(
        1, 1, tuple(tokens), parents=tuple(parents), drafter="n", confidence=tuple(confidence)
    )


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_what_is_grown_is_a_tree_of_the_likeliest_tokens(data: st.DataObject) -> None:
    """Whatever is joined: parents first, no token twice below one parent, reach never rises, a smaller budget
    gives a prefix."""
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    proposals = [chain([rng.randrange(6) for _ in range(rng.randint(1, 6))], rng.random()) for _ in range(2)]
    size = rng.randint(1, 9)
    parents = [rng.randint(-1, i - 1) for i in range(size)]
    proposals.append(
        tree([rng.randrange(6) for _ in range(size)], parents, [rng.random() for _ in range(size)])
    )
    rows = {t: [(rng.randrange(6), rng.random() / 3) for _ in range(3)] for t in range(6)}
    known = {"r": lambda token: rows[token]}
    whole = grow(proposals, known, 0, 16)
    assert len(whole.token_ids) <= 16
    assert all(-1 <= parent < i for i, parent in enumerate(whole.parents))
    assert len(set(zip(whole.parents, whole.token_ids, strict=True))) == len(whole.token_ids)
    reached = reach(tree(whole.token_ids, whole.parents, whole.confidence))
    assert all(a >= b - 1e-9 for a, b in pairwise(reached))
    for parent in set(whole.parents):
        below = [c for p, c in zip(whole.parents, whole.confidence, strict=True) if p == parent]
        assert sum(below) <= 1 + 1e-9
    fewer = rng.randint(0, 16)
    part = grow(proposals, known, 0, fewer)
    assert part.token_ids == whole.token_ids[:fewer]
    assert part.parents == whole.parents[:fewer]


def test_guesses_that_agree_are_surer_and_say_whose_they_are() -> None:
    a, b = chain([4, 5], 0.5), chain([4, 6], 0.5, NESTED)
    grown = grow([a, b], {}, 0, 3)
    assert grown.token_ids == [4, 5, 6]
    assert grown.parents == [-1, 0, 0]
    assert grown.confidence[0] == pytest.approx(0.75)
    # The nested drafter's guesses are its own also where others guessed the same: they judge its exits.
    assert grown.sources == [NESTED, "a", NESTED]


def test_a_continuer_goes_on_below_the_guesses_of_others() -> None:
    grown = grow([chain([7], 0.9)], {"r": lambda token: [(token + 1, 0.5)] if token == 7 else []}, 0, 4)
    assert grown.token_ids == [7, 8]
    assert grown.parents == [-1, 0]
    assert grown.sources == ["a", "r"]


def test_the_best_chain_of_a_tree() -> None:
    found = best_chain(tree([1, 2, 3, 4, 5], [-1, -1, 1, 0, 3], [0.9, 0.05, 0.5, 0.8, 0.7]))
    assert found.token_ids == (1, 4, 5)
    assert found.confidence == (0.9, 0.8, 0.7)
    assert found.parents == ()
    alone = chain([1, 2], 0.5)
    assert best_chain(alone) is alone
    assert parents_of(alone) == (-1, 0)


def test_parents_that_do_not_come_first_are_refused() -> None:
    for parents in ((0, -1), (-1, 5), (-2, 0)):
        with pytest.raises(ValueError, match="parent"):
            SessionDraft(1, 1, (1, 2), parents=parents)


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_verdict_follows_the_targets_tokens_down(seed: int) -> None:
    """Against a walk over dictionaries."""
    rng = random.Random(seed)
    size = rng.randint(0, 12)
    parents = [rng.randint(-1, i - 1) for i in range(size)]
    tokens = [rng.randrange(3) for _ in range(size)]
    decided = [rng.randrange(3) for _ in range(size + 1)]
    asked: list[tuple[int, int]] = []

    def decide(row: int, depth: int) -> int:
        asked.append((row, depth))
        return decided[row]

    verdict = accept_path(decide, tokens, parents)
    at, path = -1, list[int]()
    while True:
        below = [i for i in range(size) if parents[i] == at and tokens[i] == decided[at + 1]]
        if not below:
            break
        at = below[0]
        path.append(at)
    assert verdict.path == tuple(path)
    assert verdict.accepted == len(path)
    assert verdict.next_token == decided[at + 1]
    assert asked == [(0, 0), *((i + 1, d + 1) for d, i in enumerate(path))]
    assert [depths(parents)[i] for i in path] == list(range(1, len(path) + 1))


def test_recycled_rows_are_weighed_by_how_often_each_rank_was_right() -> None:
    drafter = TokenRecyclingDrafter(width=3)
    drafter.open(SessionOpen(1, (5,), 1, DraftSampling(key=0)))
    before = dict(drafter.continuations(1, 5))
    assert before == {}
    drafter.commit(1, (), [(5, (6, 7, 8)), (7, (5, 9, 4))])
    first = [p for _, p in drafter.continuations(1, 5)]
    assert [t for t, _ in drafter.continuations(1, 5)] == [6, 7, 8]
    for _ in range(60):  # always the second entry, then back by the first
        drafter.commit(1, (7, 5), [(5, (6, 7, 8)), (7, (5, 9, 4))])
    later = [p for _, p in drafter.continuations(1, 5)]
    assert later[1] > first[1]
    assert later[2] < first[2]
    assert later[0] == pytest.approx(0.5, abs=0.1)
    drafter.reset()
    assert drafter.continuations(1, 5) == []


def test_acceptance_of_trees_is_learned_by_place_and_by_what_was_said() -> None:
    model, request = AcceptanceModel(), RequestAcceptance()
    offered = tree([1, 2, 3], [-1, -1, 0], [0.3, 0.6, 0.5])
    prior = model.expected_tree_survival(request, TREE, 3)
    assert prior[0] > prior[1] > prior[2] > 0
    for _ in range(300):
        model.proposed_tree(request, offered, TREE)
        model.emitted(request, [2])  # nothing below 2 is known: judged at once
    values = model.tree_survival(request, offered, TREE)
    assert values == sorted(values, reverse=True)
    assert values[0] < 0.2, "it never was, whatever it promised"
    fresh = tree([9], [-1], [0.6])
    assert model.tree_survival(RequestAcceptance(), fresh, TREE)[0] > 0.8
    assert model.table()[TREE][1] > 0.9


def test_a_tree_is_judged_once_the_target_has_left_it() -> None:
    model, request = AcceptanceModel(), RequestAcceptance()
    model.proposed_tree(request, tree([1, 2], [-1, 0], [0.5, 0.5]), TREE)
    model.emitted(request, [1])
    assert request.pending is not None, "what follows 1 is not known yet"
    model.emitted(request, [3])
    assert request.pending is None
    assert request.drafters[TREE].hits == 1


def test_an_exit_is_judged_by_its_own_chain_in_a_joined_tree() -> None:
    model, request = AcceptanceModel(), RequestAcceptance()
    offered = SessionDraft(
        1, 1, (1, 2, 3, 4), parents=(-1, -1, 0, 2), drafter=TREE, exit_depth=4,
        confidence=(0.5, 0.3, 0.4, 0.4), sources=(NESTED, "a", NESTED, NESTED),
    )  # fmt: skip
    model.proposed_tree(request, offered, TREE)
    model.emitted(request, [1, 3, 9])
    (rates, trials) = model.exit_evidence()[4]
    assert trials == (1, 1, 1)
    assert rates[0] > 0.5
    assert rates[2] < 0.5


def test_a_record_knows_places_up_to_the_longest_draft() -> None:
    record = TreeRecord()
    tokens = tuple(range(MAX_DRAFT_TOKENS))
    drafted = SessionDraft(1, 1, tokens, parents=(-1,) * len(tokens), drafter=TREE)
    assert len(record.expected(drafted)) == MAX_DRAFT_TOKENS


# The pool


class Slow:
    """Guesses one token, right or wrong, and takes its time on the pool's clock."""

    learns = False

    def __init__(self, name: str, token: int, clock: list[float], seconds: float) -> None:
        self.name, self._token, self._clock, self._seconds = name, token, clock, seconds
        self.asked = 0

    def open(self, session: SessionOpen) -> None: ...

    def commit(self, session_id: int, new_tokens: Sequence[int], candidates: object = ()) -> None: ...

    def propose(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
        self.asked += len(queries)
        self._clock[0] += self._seconds
        return [
            SessionDraft(q.session_id, q.epoch, (self._token,), drafter=self.name, confidence=(0.6,))
            for q in queries
        ]

    def close(self, session_id: int) -> None: ...

    def reset(self, scope: str = "all") -> None: ...


@pytest.mark.parametrize(
    ("first", "slow_s", "often"),
    [
        (8, 0.002, True),  # nobody else guesses the token, and it costs a fifth of a round
        (7, 0.002, False),  # the first drafter guesses the same
        (8, 0.02, False),  # right, but two rounds' worth of time
    ],
)
def test_a_drafter_is_asked_for_what_it_adds(first: int, slow_s: float, often: bool) -> None:
    clock = [0.0]
    cheap, dear = Slow("cheap", first, clock, 0.0), Slow("dear", 7, clock, slow_s)
    pool = DrafterPool([cheap, dear], clock=lambda: clock[0])
    pool.open(SessionOpen(1, (1,), 1, DraftSampling(key=0), trees=True))
    for epoch in range(1, 301):
        clock[0] += 0.01
        update = SessionUpdate(1, epoch, (7,), 4)
        pool.apply(update)
        (draft,) = pool.propose([update])
        assert draft.parents
        assert draft.drafter == TREE
        if epoch == 1:
            assert set(draft.token_ids) == {first, 7}
    assert cheap.asked == 300
    assert (dear.asked > 250) is often, dear.asked
    assert dear.asked >= 4, "tried again now and then"


class SlowExit(Slow):
    """Has an exit that requests may pin."""

    exits = (2,)


@pytest.mark.parametrize("trees", [False, True])
def test_who_pins_an_exit_gets_its_drafts_whatever_they_are_worth(trees: bool) -> None:
    clock = [0.0]
    nested = SlowExit("nested", 8, clock, 0.02)  # always wrong, and two rounds' worth of time
    pool = DrafterPool([Slow("cheap", 7, clock, 0.0), nested], clock=lambda: clock[0])
    pool.open(SessionOpen(1, (1,), 1, DraftSampling(key=0), trees=trees))
    for epoch in range(1, 101):
        clock[0] += 0.01
        update = SessionUpdate(1, epoch, (7,), 4, exit_depth=2)
        pool.apply(update)
        (draft,) = pool.propose([update])
        assert draft.token_ids == (8,)
    assert nested.asked == 100


def test_sessions_of_targets_without_trees_get_chains() -> None:
    pool = DrafterPool([Slow("a", 3, [0.0], 0.0), TokenRecyclingDrafter()])
    pool.open(SessionOpen(1, (1,), 1, DraftSampling(key=0)))
    update = SessionUpdate(1, 1, (2,), 4)
    pool.apply(update)
    (draft,) = pool.propose([update])
    assert draft.parents == ()
    assert draft.drafter == "a"


def test_who_pins_a_drafter_gets_its_tree_under_its_name() -> None:
    pool = DrafterPool([Slow("a", 3, [0.0], 0.0), TokenRecyclingDrafter()])
    pool.open(SessionOpen(1, (1,), 1, DraftSampling(key=0), trees=True))
    update = SessionUpdate(1, 1, (2,), 4, candidates=((2, (5, 6)),), drafter="token_recycling")
    pool.apply(update)
    (draft,) = pool.propose([update])
    assert draft.token_ids[:2] == (5, 6)
    assert draft.parents[:2] == (-1, -1)
    assert draft.drafter == "token_recycling"
    assert draft.sources == ()
