"""The pool asks, and takes, what promises most: by record, by confidence, drafting time counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from actors.drafting.interface import SCOPE_SHIFT, DraftQuery, SessionDraft, SessionOpen, SessionUpdate
from actors.drafting.local_source import LocalDraftSource
from actors.drafting.selector import DrafterPool
from actors.drafting.worth import MAX_TARGETS, DraftWorth
from actors.sampling.params import DraftSampling

SLOW, FAST = 1 << SCOPE_SHIFT, 2 << SCOPE_SHIFT
"""Sessions of two targets of a draft worker."""


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def draft(name: str, tokens: Sequence[int], confidence: Sequence[float] = ()) -> SessionDraft:
    return SessionDraft(0, 1, tuple(tokens), drafter=name, confidence=tuple(confidence))


def worth_with(accepted: int, rounds: int = 200, token_s: float = 0.0) -> tuple[DraftWorth, Clock]:
    """Drafter "n" whose drafts of two had `accepted` right, on a target that takes 10 ms a round."""
    clock = Clock()
    worth = DraftWorth(clock)
    worth.opened(0)
    for _ in range(rounds):
        offered = draft("n", (1, 2))
        worth.drafted("n", [offered], 2 * token_s)
        worth.taken(offered)
        clock.now += 0.01
        worth.committed(0, [(9,), (1,), (1, 2)][accepted])
        if accepted == 1:
            clock.now += 0.01
            worth.committed(0, (9,))
    return worth, clock


def test_a_guess_is_worth_the_tokens_that_it_promises() -> None:
    worth, _ = worth_with(0)
    assert worth.of(draft("x", (1, 2, 3), (0.5, 0.5, 0.2))) == pytest.approx(0.5 + 0.25 + 0.05)
    assert worth.of(draft("n", (1, 2))) < 0.05
    assert worth_with(2)[0].of(draft("n", (1, 2))) > 1.8


@pytest.mark.parametrize(
    ("accepted", "token_s", "held", "asked"),
    [
        (2, 0.0, 1.5, True),  # promises nearly two tokens
        (2, 0.0, 2.0, False),
        (2, 0.002, 1.3, False),  # two tokens of 2 ms cost 0.8 of those that come every 5 ms
        (2, 0.002, 1.0, True),
        (0, 0.0, 0.1, False),
        (1, 0.0, 0.5, True),
    ],
)
def test_who_promises_more_is_asked_too(accepted: int, token_s: float, held: float, asked: bool) -> None:
    worth, _ = worth_with(accepted, token_s=token_s)
    in_hand = draft("x", (5, 6, 7), (min(1.0, held), max(0.0, held - 1.0), 0.0))
    assert worth.of(in_hand) == pytest.approx(held)
    assert worth.wants("n", 0, 6, in_hand) is asked
    assert worth.wants("n", 0, 6, None)


def test_all_who_wait_count() -> None:
    """Four sessions could decode four times as much while one is drafted for."""
    worth, _ = worth_with(2, token_s=0.002)
    in_hand = draft("x", (5,), (1.0,))
    assert worth.wants("n", 0, 6, in_hand)
    assert not worth.wants("n", 0, 6, in_hand, together=4)
    alone, among = worth.least_survival("n", 0, False), worth.least_survival("n", 0, False, together=2)
    assert among == pytest.approx(min(0.95, 2 * alone))


def test_drawn_drafts_are_worth_what_became_of_what_was_verified() -> None:
    """The target's own draw is another token than one that was not verified, however alike they are drawn."""
    worth, judged = DraftWorth(Clock()), DraftWorth(Clock())
    offered = SessionDraft(0, 1, (1, 2), drafter="n", q=(((1, 1.0),), ((2, 1.0),)))
    for known in (worth, judged):
        known.opened(0, temperature=1.0)
    before = worth.of(draft("n", (1, 2)))
    for _ in range(50):
        worth.taken(offered)
        worth.committed(0, (9,))
        judged.taken(offered)
        judged.committed(0, (1, 2, 9), verified=2)
    assert worth.of(draft("n", (1, 2))) == before
    assert judged.of(draft("n", (1, 2))) > 1.7


def draft_for(session: int, tokens: int = 1) -> SessionDraft:
    return SessionDraft(session, 1, tuple(range(tokens)), drafter="n", parents=tuple(range(-1, tokens - 1)))


def several(sessions: int, seconds: dict[int, float]) -> tuple[DraftWorth, Clock]:
    """Sessions that get a token every 10 ms, and a drafter that takes `seconds` by how many it drafts for."""
    clock = Clock()
    worth = DraftWorth(clock)
    for sid in range(sessions):
        worth.opened(sid)
    for _ in range(100):
        for count, took in seconds.items():
            worth.guessed("n", [draft_for(sid) for sid in range(count)], took)
        clock.now += 0.01
        for sid in range(sessions):
            worth.committed(sid, (9,))
    return worth, clock


def test_a_drafter_is_asked_for_those_that_are_worth_it_together() -> None:
    """Eight wait. Drafting for one costs as much as for all: alone no session would be worth it."""
    worth, _ = several(8, {1: 0.004, 8: 0.0045})
    nothing: dict[int, dict[int, float]] = {sid: {} for sid in range(8)}
    for _ in range(70):
        alone = worth.adding("n", {0: {}}, together=8)
        assert sorted(worth.adding("n", nothing, together=8)) == list(range(8))
    assert not alone
    known = {sid: ({5: 1.0} if sid < 6 else {}) for sid in range(8)}
    assert not worth.adding("n", known, together=8), "two for which nobody else guesses are too few"
    dear, _ = several(8, {count: 0.004 * count for count in (1, 2, 4, 8)})
    assert len(dear.adding("n", nothing, together=8)) <= 1, "each costs as much as alone"


def test_what_was_read_first_does_not_make_drafts_dear() -> None:
    """A session that the drafter has not seen for long costs more, once."""
    worth, clock = several(1, {1: 0.001})
    before = worth.least_survival("n", 0, continued=False)
    for _ in range(30):
        for _ in range(20):
            clock.now += 0.01
            worth.committed(0, (9,))
        worth.guessed("n", [draft_for(0)], 0.008)
    assert worth.least_survival("n", 0, continued=False) == pytest.approx(before, rel=0.1)
    for _ in range(60):
        worth.guessed("n", [draft_for(0)], 0.002)
    assert worth.least_survival("n", 0, continued=False) > 1.5 * before


def test_what_drafting_takes_is_known_beyond_a_reset() -> None:
    worth, _ = worth_with(2, token_s=0.001)
    before = worth.least_survival("n", 0, False)
    worth.reset()
    assert worth.least_survival("n", 0, False) == pytest.approx(before)


def test_who_is_passed_over_is_tried_again() -> None:
    worth, _ = worth_with(0)
    good = draft("x", (5,), (0.9,))
    assert sum(worth.wants("n", 0, 6, good) for _ in range(640)) == 10


def test_pauses_are_not_the_targets_pace() -> None:
    worth, clock = worth_with(2, token_s=0.002)
    before = worth.least_survival("n", 0, False)
    assert 0.0 < before < 0.95
    clock.now += 5.0
    worth.committed(0, (3,))
    assert worth.least_survival("n", 0, False) == before


@pytest.mark.parametrize(("sessions", "pause_s"), [(1, 0.8), (1, 60.0), (8, 60.0)])
def test_a_pause_of_all_sessions_is_not_the_targets_pace(sessions: int, pause_s: float) -> None:
    worth, clock = several(sessions, {1: 0.001})
    before = worth.least_survival("n", 0, False)
    clock.now += pause_s
    for sid in range(sessions):
        worth.committed(sid, (9,))
    assert worth.least_survival("n", 0, False) == before


@pytest.mark.parametrize("token_s", [0.5, 2.5, 20.0])
def test_a_target_may_be_slow_or_become_so(token_s: float) -> None:
    worth, clock = several(1, {1: 0.001})
    worth.opened(SLOW)
    for _ in range(200):
        worth.guessed("n", [draft_for(SLOW)], 0.001)
        clock.now += token_s
        worth.committed(0, (9,))
        worth.committed(SLOW, (9,))
    for sid in (0, SLOW):
        assert worth.least_survival("n", sid, False) == pytest.approx(0.001 / token_s / 0.5, rel=0.01)


def targets(*present: int) -> DraftWorth:
    """A target that takes 400 ms a round and whose guesses are right, one that takes 8 ms and whose guesses
    are wrong, and a drafter that takes 4 ms a token."""
    clock = Clock()
    worth = DraftWorth(clock)
    for sid in present:
        worth.opened(sid)
    for tick in range(50 * 100):
        clock.now = tick * 0.008
        for sid in present:
            if sid == FAST or tick % 50 == 0:
                worth.committed(sid, (0, 1) if sid == SLOW else (9, 9))
                worth.adding("n", {sid: {}})
                offered = draft_for(sid, 6)
                worth.guessed("n", [offered], 6 * 0.004)
                worth.taken(offered)
    return worth


def test_what_drafts_are_worth_to_a_target_does_not_depend_on_others() -> None:
    def judged(worth: DraftWorth, sid: int) -> list[object]:
        asked = [worth.wants("n", sid, 6, draft("x", (5,) * 6, (n / 20,) * 6)) for n in range(1, 20)]
        added = [list(worth.adding("n", {sid: {5: n / 20}})) for n in range(20)]
        least = [worth.least_survival("n", sid, c, n) for c in (True, False) for n in (1, 4)]
        return [asked, added, least, worth.of(SessionDraft(sid, 1, (5, 6), drafter="n"))]

    slow, fast, both = targets(SLOW), targets(FAST), targets(FAST, SLOW)
    alone = judged(slow, SLOW), judged(fast, FAST)
    assert (judged(both, SLOW), judged(both, FAST)) == alone
    assert alone[0] != alone[1]
    assert both.least_survival("n", SLOW, False) == pytest.approx(0.004 / 0.2 / 0.5)


def test_of_targets_that_wait_together_the_slow_one_is_asked_for() -> None:
    worth = targets(FAST, SLOW)
    worth.guessed("n", [draft_for(SLOW, 6), draft_for(FAST, 6)], 6 * 0.008)
    nothing: dict[int, dict[int, float]] = {FAST: {}, SLOW: {}}
    chosen = [worth.adding("n", nothing, together=2) for _ in range(64)]
    assert all(SLOW in sids for sids in chosen)
    assert sum(FAST in sids for sids in chosen) == 1, "it is tried again, though the other is asked for"
    assert worth.least_survival("n", SLOW, False, 2, 2) == pytest.approx(0.008 / 0.2 / 0.5)


def test_each_exit_has_its_price() -> None:
    clock = Clock()
    worth = DraftWorth(clock)
    exits = {SLOW: 12, FAST: 4}
    for sid in exits:
        worth.opened(sid)
    for _ in range(50):
        clock.now += 0.1
        for sid, exit_depth in exits.items():
            worth.committed(sid, (9,))
            guess = SessionDraft(sid, 1, (1,), drafter="n", exit_depth=exit_depth, parents=(-1,))
            worth.guessed("n", [guess], 0.001 * exit_depth)
    for sid, exit_depth in exits.items():
        assert worth.least_survival("n", sid, False) == pytest.approx(0.001 * exit_depth / 0.1 / 0.5)


def test_a_target_without_sessions_is_remembered_for_a_while() -> None:
    worth, _ = several(1, {1: 0.001})
    before = worth.least_survival("n", 0, False)
    worth.closed(0)
    worth.opened(0)
    assert worth.least_survival("n", 0, False) == before
    for scope in range(1, MAX_TARGETS + 1):
        worth.opened(scope << SCOPE_SHIFT)
        worth.closed(scope << SCOPE_SHIFT)
    assert worth.least_survival("n", 0, False) == before, "an open session keeps what is known of its target"
    worth.opened(0)
    assert worth.least_survival("n", 0, False) == 0.0


class Scripted:
    """Proposes the same two tokens with the same confidence; counts how often it is asked."""

    learns = False

    def __init__(self, name: str, token: int, confidence: float) -> None:
        self.name, self._token, self._confidence, self.asked = name, token, confidence, 0

    def open(self, session: SessionOpen) -> None: ...

    def commit(self, session_id: int, new_tokens: Sequence[int], candidates: object = ()) -> None: ...

    def propose(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
        self.asked += len(queries)
        sure = (self._confidence,) * 2
        return [
            SessionDraft(q.session_id, q.epoch, (self._token,) * 2, drafter=self.name, confidence=sure)
            for q in queries
        ]

    def close(self, session_id: int) -> None: ...

    def reset(self, scope: str = "all") -> None: ...


def test_the_pool_learns_whom_to_take() -> None:
    """The first is unsure and mostly wrong, the second right: soon the second drafts. A sure first keeps it
    from being asked."""
    first, second = Scripted("first", 1, 0.2), Scripted("second", 2, 0.8)
    pool = DrafterPool([first, second])
    pool.open(SessionOpen(0, (7,), 1, DraftSampling(1)))
    taken = []
    for epoch in range(1, 201):
        update = SessionUpdate(0, epoch, (2, 2), 2)
        pool.apply(update)
        taken.append(pool.propose([update])[0].drafter)
    assert taken[-100:] == ["second"] * 100
    first._confidence, second.asked = 0.99, 0
    for epoch in range(201, 301):
        update = SessionUpdate(0, epoch, (1, 1), 2)
        pool.apply(update)
        pool.propose([update])
    assert second.asked <= 3


class Unsure(Scripted):
    """Says nothing of how sure it is."""

    def propose(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
        return [replace(d, confidence=()) for d in super().propose(queries)]


def test_the_pool_knows_requests_of_like_temperature() -> None:
    """The first is right where requests are greedy, the second where they are not."""
    pool = DrafterPool([Unsure("first", 1, 1.0), Scripted("second", 2, 0.6)])
    for _ in range(100):
        drafters = []
        for sid, temperature in enumerate((0.0, 1.0)):
            pool.open(SessionOpen(sid, (7,), 1, DraftSampling(1, temperature)))
            wish = SessionUpdate(sid, 1, (), 2)
            pool.apply(wish)
            drafters.append(pool.propose([wish])[0].drafter)
            pool.apply(SessionUpdate(sid, 2, (2, 2) if temperature else (1, 1), 0))
            pool.close(sid)
    assert drafters == ["first", "second"]


class Slow(Scripted):
    """Takes 4 ms a draft."""

    def __init__(self, clock: Clock) -> None:
        super().__init__("slow", 2, 0.9)
        self._clock = clock

    def propose(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
        self._clock.now += 0.004
        return super().propose(queries)


@pytest.mark.parametrize(("others", "asked"), [(0, True), (7, False)])
def test_sequences_that_want_no_draft_wait_too(others: int, asked: bool) -> None:
    """A target that drafts for itself stands still: what a draft takes, it takes from all its sequences."""
    clock = Clock()
    slow = Slow(clock)
    source = LocalDraftSource(DrafterPool([Scripted("first", 1, 0.3), slow], clock=clock))
    for sid in range(others + 1):
        source.open(SessionOpen(sid, (7,), 1, DraftSampling(1)))
    for epoch in range(1, 301):
        if epoch == 201:
            slow.asked = 0
        source.submit([SessionUpdate(0, epoch, (2, 2), 2)])
        source.collect({0: epoch}, 1.0)
        clock.now += 0.01
    assert (slow.asked == 100) if asked else (slow.asked <= 3)
