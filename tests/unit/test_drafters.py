"""Model-free drafters, the pool that chooses among drafters, and the sources that run in-process."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.drafting.acceptance import RunningAcceptance, confirmed_prefix
from actors.drafting.errors import DrafterError
from actors.drafting.interface import DraftQuery, SessionDraft, SessionOpen, SessionUpdate
from actors.drafting.local_source import LocalDraftSource
from actors.drafting.placed_source import PlacedDraftSource
from actors.drafting.prompt_lookup import PromptLookupDrafter
from actors.drafting.selector import DrafterPool
from actors.drafting.token_recycling import MAX_VOCAB, MAX_VOCABULARIES, TokenRecyclingDrafter
from actors.sampling.params import MAX_DRAFT_TOKENS, DraftSampling

SAMPLING = DraftSampling(key=1)


def session(sid: int, tokens: Sequence[int], epoch: int = 0) -> SessionOpen:
    return SessionOpen(sid, tuple(tokens), len(tokens), SAMPLING, epoch)


def guess(drafter, sid: int = 0, budget: int = 4) -> tuple[int, ...]:  # type: ignore[no-untyped-def]
    (draft,) = drafter.propose([DraftQuery(sid, 1, budget)])
    return draft.token_ids


def lookup(tokens: Sequence[int], budget: int = 4, **options: int) -> tuple[int, ...]:
    drafter = PromptLookupDrafter(**options)
    drafter.open(session(0, tokens))
    return guess(drafter, budget=budget)


def test_prompt_lookup_copies_what_followed_the_suffix() -> None:
    assert lookup([1, 2, 3, 4, 5, 6, 9, 2, 3]) == (4, 5, 6, 9)
    assert lookup([1, 2, 3, 4]) == ()
    assert lookup([5]) == ()


def test_prompt_lookup_prefers_the_longest_then_the_most_recent_match() -> None:
    assert lookup([7, 1, 2, 30, 8, 1, 2, 40, 7, 1, 2], budget=1) == (30,)
    assert lookup([7, 1, 2, 30, 8, 1, 2, 40, 9, 1, 2], budget=1) == (40,)


def test_prompt_lookup_continues_periodic_text() -> None:
    assert lookup([1, 2, 3, 1, 2, 3], budget=8) == (1, 2, 3, 1, 2, 3, 1, 2)
    assert lookup([4, 4, 4], budget=5) == (4,) * 5


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    cuts=st.lists(st.integers(1, 59), max_size=4),
    budget=st.integers(1, 6),
)
def test_prompt_lookup_equals_a_search_of_everything(tokens: list[int], cuts: list[int], budget: int) -> None:
    """Against brute force; growing by commits gives what opening with all tokens gives."""
    low, high = 2, 5
    drafter = PromptLookupDrafter(low, high, max_candidates=1000)
    bounds = sorted({c for c in cuts if c < len(tokens)} | {len(tokens)})
    drafter.open(session(0, tokens[: bounds[0]]))
    for a, b in pairwise(bounds):
        guess(drafter)
        drafter.commit(0, tokens[a:b])
    best, at = 0, -1
    for i in range(1, len(tokens)):
        length = 0
        while length < min(high, i) and tokens[i - 1 - length] == tokens[len(tokens) - 1 - length]:
            length += 1
        if length >= low and length >= best:
            best, at = length, i
    expected: list[int] = []
    while at >= 0 and len(expected) < budget:
        expected.append((tokens + expected)[at + len(expected)])
    assert guess(drafter, budget=budget) == tuple(expected)


def test_prompt_lookup_cost_does_not_grow_with_the_context() -> None:
    def round_time(length: int) -> float:
        drafter = PromptLookupDrafter()
        drafter.open(session(0, [i % 50 for i in range(length)]))
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(200):
                drafter.commit(0, [7, 8, 9])
                guess(drafter, budget=8)
            best = min(best, time.perf_counter() - started)
        return best

    assert round_time(200_000) < 8 * round_time(2_000)


def test_confidence_follows_acceptance() -> None:
    drafter = PromptLookupDrafter()
    drafter.open(session(0, [1, 2, 3, 4] * 4))
    (before,) = drafter.propose([DraftQuery(0, 1, 3)])
    for i in range(30):
        drafter.propose([DraftQuery(0, 1, 3)])
        drafter.commit(0, [100 + i, 1, 2, 3, 4])
    (after,) = drafter.propose([DraftQuery(0, 1, 3)])
    assert len(before.confidence) == 3
    assert after.confidence[0] < before.confidence[0]
    drafter.reset("caches")
    assert drafter.propose([DraftQuery(0, 1, 3)])[0].confidence == after.confidence
    drafter.reset()
    (again,) = drafter.propose([DraftQuery(0, 1, 3)])
    assert again.confidence[0] > after.confidence[0]


def test_confirmed_prefix() -> None:
    assert confirmed_prefix([1, 2, 3], [1, 2, 3, 4]) == (3, False)
    assert confirmed_prefix([1, 2, 3], [1, 9]) == (1, True)
    assert confirmed_prefix([1, 2, 3], [1, 2]) == (2, False)
    acceptance = RunningAcceptance([0.5])
    for _ in range(2000):
        acceptance.observe_draft([0, 1], 2, False)
    assert acceptance.probability(7) > 0.95


def test_token_recycling_learns_and_follows_the_best_chain() -> None:
    drafter = TokenRecyclingDrafter(width=3, vocab_size=8)
    drafter.open(session(0, [1]))
    drafter.open(session(1, [2]))
    assert guess(drafter) == ()
    drafter.commit(0, [1], [(1, (2, 9, 9)), (2, (3,)), (3, (5000, 1, 1, 1, 1))])
    assert guess(drafter, 0) == (2, 3, 5000)
    assert guess(drafter, 1) == (3, 5000), "rows are shared by sessions"
    drafter.commit(0, [], [(2, (7,))])
    assert guess(drafter, 0) == (2, 7), "the last candidates win"
    assert drafter.known_rows == 3
    drafter.commit(1, [6000], [(6000, (1,)), (MAX_VOCAB, (1,)), (4, ())])
    assert guess(drafter, 1, budget=2) == (1, 2), "the matrix grows"
    assert drafter.known_rows == 4
    drafter.reset()
    assert guess(drafter, 0) == ()
    assert drafter.known_rows == 0


def test_token_recycling_forgets_texts_and_keeps_how_often_it_was_right() -> None:
    drafter = TokenRecyclingDrafter()
    drafter.open(session(0, [1]))
    drafter.commit(0, [1], [(1, (2, 3))])
    drafter.commit(0, [2], [(1, (2, 3)), (2, (1, 3))])
    for _ in range(20):
        drafter.commit(0, [1, 2])
    before = drafter.continuations(0, 1)
    drafter.reset("caches")
    assert drafter.continuations(0, 1) == []
    assert drafter.known_rows == 0
    drafter.commit(0, [], [(1, (2, 3))])
    assert drafter.continuations(0, 1) == before
    drafter.reset()
    drafter.commit(0, [], [(1, (2, 3))])
    assert drafter.continuations(0, 1)[0][1] < before[0][1]


def test_token_recycling_keeps_vocabularies_apart() -> None:
    drafter = TokenRecyclingDrafter(vocab_size=8)
    for sid, vocabulary in enumerate(("small", "large", "small")):
        drafter.open(replace(session(sid, [1]), vocabulary=vocabulary))
    drafter.commit(0, [1], [(1, (2,))])
    drafter.commit(1, [1], [(1, (200_000,)), (2, (3,))])
    assert guess(drafter, 0) == guess(drafter, 2) == (2,)
    assert guess(drafter, 1) == (200_000,)
    assert [token for token, _ in drafter.continuations(2, 1)] == [2]
    assert drafter.known_rows == 3
    drafter.reset()
    drafter.commit(0, [], [(1, (4,))])
    assert guess(drafter, 2) == (4,), "what they share, they share after a reset too"
    for index in range(MAX_VOCABULARIES):
        drafter.open(replace(session(9, [1]), vocabulary=f"another {index}"))
        drafter.commit(9, [], [(1, (2,))])
    assert drafter.known_rows == MAX_VOCABULARIES
    assert guess(drafter, 0) == (4,), "who uses a forgotten one keeps it"


class Fixed:
    """Proposes a constant; `broken` sessions make it raise."""

    learns = False

    def __init__(self, name: str, token: int | None, exits: tuple[int, ...] = ()) -> None:
        self.name = name
        self.token = token
        self.broken: set[int] = set()
        self.sessions: set[int] = set()
        self.work_left = 0
        if exits:
            self.exits = exits

    def open(self, session: SessionOpen) -> None:
        self.sessions.add(session.session_id)

    def commit(self, session_id: int, new_tokens: Sequence[int], candidates: object = ()) -> None:
        assert session_id in self.sessions

    def propose(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
        if any(q.session_id in self.broken for q in queries):
            raise RuntimeError("broken on purpose")
        tokens = () if self.token is None else (self.token,)
        return [SessionDraft(q.session_id, q.epoch, tokens * q.budget, drafter=self.name) for q in queries]

    def close(self, session_id: int) -> None:
        self.sessions.discard(session_id)

    def reset(self, scope: str = "all") -> None:
        self.broken.clear()

    def work(self) -> bool:
        self.work_left -= 1
        return self.work_left >= 0


def ask(pool: DrafterPool, *updates: SessionUpdate) -> list[SessionDraft]:
    for update in updates:
        pool.apply(update)
    return pool.propose(updates)


def wish(sid: int, epoch: int = 1, budget: int = 2, **fields: object) -> SessionUpdate:
    return replace(SessionUpdate(sid, epoch, (), budget), **fields)  # type: ignore[arg-type]


def test_pool_takes_the_first_drafter_with_a_guess() -> None:
    pool = DrafterPool([PromptLookupDrafter(), TokenRecyclingDrafter()])
    pool.open(session(0, [1, 2, 3, 1, 2]))
    pool.open(session(1, [8, 9]))
    pool.open(session(2, [50]))
    drafts = ask(pool, wish(0), wish(1, candidates=((9, (4,)), (4, (6,)))), wish(2))
    assert [(d.drafter, d.token_ids) for d in drafts] == [
        ("prompt_lookup", (3, 1)),
        ("token_recycling", (4, 6)),
        ("", ()),
    ]
    assert all(d.error is None for d in drafts)
    (pinned,) = ask(pool, wish(0, 2, drafter="token_recycling"))
    assert pinned.token_ids == ()
    assert pool.wants_candidates == 8


def test_pool_refuses_what_it_does_not_have() -> None:
    pool = DrafterPool([Fixed("a", 1), Fixed("n", 2, exits=(2, 4))])
    pool.open(session(0, [1]))
    errors = [
        ask(pool, wish(0, i + 1, **pin))[0].error
        for i, pin in enumerate(
            (
                {"drafter": "x"},
                {"exit_depth": 3},
                {"drafter": "a", "exit_depth": 2},
                {"exit_depth": 4},
                {"drafter": "n", "exit_depth": 2},
            )
        )
    ]
    assert errors == ["unsupported", "unsupported", "unsupported", None, None]
    assert ask(pool, wish(0, 6, exit_depth=4))[0].drafter == "n"
    with pytest.raises(DrafterError, match="does not follow"):
        pool.apply(wish(0, 6))
    with pytest.raises(DrafterError) as caught:
        pool.apply(wish(5))
    assert caught.value.code == "unknown_session"


def test_pool_caps_budgets_and_sessions() -> None:
    pool = DrafterPool([Fixed("a", 1)], max_sessions=1)
    pool.open(session(0, [1]))
    assert len(ask(pool, wish(0, budget=10_000))[0].token_ids) == MAX_DRAFT_TOKENS
    assert ask(pool, wish(0, 2, budget=0))[0].token_ids == ()
    with pytest.raises(DrafterError) as caught:
        pool.open(session(1, [1]))
    assert caught.value.code == "capacity"
    pool.open(session(0, [1, 2]))
    assert pool.num_sessions == 1


def test_a_failing_drafter_costs_its_sessions_only(caplog: pytest.LogCaptureFixture) -> None:
    bad, good = Fixed("bad", 1), Fixed("good", 2)
    pool = DrafterPool([bad, good])
    for sid in range(3):
        pool.open(session(sid, [1]))
    bad.broken = {1}
    drafts = ask(pool, *(wish(sid) for sid in range(3)))
    assert [d.drafter for d in drafts] == ["bad", "good", "bad"]
    assert "broken on purpose" in caplog.text
    (pinned,) = ask(pool, wish(1, 2, drafter="bad"))
    assert pinned.error == "unknown_session"
    assert ask(pool, wish(1, 3))[0].drafter == "good"
    (other,) = ask(pool, wish(0, 2, drafter="bad"))
    assert other.token_ids == (1, 1)
    bad.broken = {0}
    (failed,) = ask(pool, wish(0, 3, drafter="bad"))
    assert failed.error == "internal"
    bad.broken = set()
    pool.open(session(0, [1], epoch=3))
    assert ask(pool, wish(0, 4, drafter="bad"))[0].token_ids == (1, 1)
    for sid in range(3):
        pool.close(sid)
    assert bad.sessions == good.sessions == set()


class Full(Fixed):
    """Has no room for any session."""

    def propose(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
        return [SessionDraft(q.session_id, q.epoch, drafter=self.name, error="capacity") for q in queries]


@pytest.mark.parametrize("trees", [False, True])
def test_a_drafter_without_room_does_not_speak_for_the_others(trees: bool) -> None:
    """After an error a session is not asked for again for a while (`RETRY_S`), by anybody."""
    cheap, full = Fixed("cheap", None), Full("full", 2, exits=(2,))
    pool = DrafterPool([cheap, full])
    pool.open(replace(session(0, [1]), trees=trees))
    (draft,) = ask(pool, wish(0))
    assert (draft.error, draft.token_ids) == (None, ()), "no guess, this time"
    cheap.token = 7
    assert ask(pool, wish(0, 2))[0].token_ids == (7, 7)
    for epoch, pin in ((3, {"drafter": "full"}), (4, {"exit_depth": 2})):
        assert ask(pool, wish(0, epoch, **pin))[0].error == "capacity"
    cheap.broken = {0}
    assert ask(pool, wish(0, 5))[0].error == "internal", "nobody is left"
    assert ask(pool, wish(0, 6))[0].error == "capacity"
    alone = DrafterPool([Full("full", 2)])
    alone.open(replace(session(0, [1]), trees=trees))
    assert ask(alone, wish(0))[0].error == "capacity"


def test_pool_does_background_work_until_there_is_none() -> None:
    drafter = Fixed("a", 1)
    drafter.work_left = 2
    pool = DrafterPool([drafter])
    assert [pool.work(), pool.work(), pool.work()] == [True, True, False]


def test_local_source_drafts_for_what_is_collected() -> None:
    source = LocalDraftSource(DrafterPool([PromptLookupDrafter(), TokenRecyclingDrafter()], max_sessions=2))
    source.open(session(0, [1, 2, 3, 1]))
    source.open(session(1, [5]))
    source.open(session(2, [5]))
    source.submit([wish(0, 1, new_tokens=(2,)), wish(1), wish(2)])
    drafts = source.collect({0: 1, 1: 1, 2: 1}, 0.0)
    assert drafts[0].token_ids == (3, 1)
    assert drafts[1].token_ids == ()
    assert drafts[2].error == "capacity"
    assert 0 not in source.collect({0: 7}, 0.0), "an epoch that was never submitted"
    source.submit([wish(0, 2, new_tokens=(3,))])
    assert source.collect({0: 2}, 0.0)[0].token_ids == (1, 2)
    source.close_session(0)
    source.open(session(3, [1, 2, 1]))
    source.submit([wish(3, new_tokens=(2,))])
    assert source.collect({3: 1}, 0.0)[3].token_ids == (1, 2)
    source.close()
    assert source.stats()["sessions"] == 0


class Away:
    """A remote source that answers while it is connected."""

    drafters = ("nested",)
    wants_candidates = 0

    def __init__(self) -> None:
        self.connected = True

    def open(self, session: SessionOpen) -> None: ...
    def submit(self, updates: Sequence[SessionUpdate], timeout_s: float = 0.0) -> None: ...

    def refuses(self, session_id: int) -> bool:
        return False

    def close_session(self, session_id: int) -> None: ...
    def reset(self, scope: str = "all") -> None: ...
    def close(self) -> None: ...

    def collect(self, wanted: Mapping[int, int], timeout_s: float) -> dict[int, SessionDraft]:
        if not self.connected:
            return {}
        return {sid: SessionDraft(sid, epoch, (77,), drafter="nested") for sid, epoch in wanted.items()}

    def stats(self) -> dict[str, object]:
        return {"connected": self.connected}


def test_fallback_takes_over_in_step_while_the_remote_is_away() -> None:
    remote = Away()
    source = PlacedDraftSource(remote, LocalDraftSource(DrafterPool([PromptLookupDrafter()])))
    assert tuple(source.drafters) == ("nested", "prompt_lookup")
    source.open(session(0, [1, 2, 3]))
    source.submit([wish(0, 1, new_tokens=(1,))])
    assert source.collect({0: 1}, 0.1)[0].token_ids == (77,)
    remote.connected = False
    source.submit([wish(0, 2, new_tokens=(2,))])
    assert source.collect({0: 2}, 0.1)[0].token_ids == (3, 1)
    source.submit([wish(0, 3, drafter="nested")])
    pinned = source.collect({0: 3}, 0.1)[0]
    assert (pinned.token_ids, pinned.error) == ((), None)
    remote.connected = True
    source.submit([wish(0, 4)])
    assert source.collect({0: 4}, 0.1)[0].token_ids == (77,)
    assert source.stats()["fallback_rounds"] == 2
    source.close()


class Waits:
    """In place of `time` in a module under test: time passes in `sleep`, and only there."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    waits = Waits()
    monkeypatch.setattr("actors.drafting.placed_source.time", waits)
    return waits


class Slow(Away):
    """A connected remote that takes its time, and notes what it was asked for."""

    drafters = ("prompt_lookup", "nested")  # type: ignore[assignment]

    def __init__(self, waits: Waits, seconds: float, drafters: tuple[str, ...]) -> None:
        super().__init__()
        self.waits = waits
        self.seconds = seconds
        self.drafters = drafters  # type: ignore[assignment]
        self.asked: list[SessionUpdate] = []

    def submit(self, updates: Sequence[SessionUpdate], timeout_s: float = 0.0) -> None:
        self.asked = [u for u in updates if u.budget > 0]

    def collect(self, wanted: Mapping[int, int], timeout_s: float) -> dict[int, SessionDraft]:
        self.waits.sleep(self.seconds)
        return super().collect(wanted, timeout_s)


def _where(source: PlacedDraftSource, remote: Slow, rounds: int, **pinned: object) -> list[str]:
    places = []
    for _ in range(rounds):
        epoch = next(_epochs)
        source.submit([wish(0, epoch, new_tokens=(1,), **pinned)])
        places.append("worker" if remote.asked else "target")
        source.collect({0: epoch}, 0.1)
    return places


_epochs = itertools.count(1)


def test_drafts_come_from_the_faster_place(waits: Waits) -> None:
    for seconds, better in ((2e-3, "target"), (1e-4, "worker")):
        remote = Slow(waits, seconds, ("prompt_lookup",))
        local = LocalDraftSource(DrafterPool([PromptLookupDrafter()]))
        if better == "worker":
            local.collect = _slowly(local.collect, waits)  # type: ignore[method-assign]
        source = PlacedDraftSource(remote, local)
        source.open(session(0, [1, 2, 3]))
        _where(source, remote, 16)
        places = _where(source, remote, 300)
        assert places.count(better) >= 295
        assert places.count(better) < 300, "the other place is tried again now and then"


def _slowly(collect, waits: Waits):  # type: ignore[no-untyped-def]
    def slow(wanted: Mapping[int, int], timeout_s: float) -> dict[int, SessionDraft]:
        waits.sleep(2e-3)
        return collect(wanted, timeout_s)  # type: ignore[no-any-return]

    return slow


@pytest.mark.parametrize(
    ("adaptive", "drafters", "pinned"),
    [
        (False, ("prompt_lookup",), {}),
        (True, ("prompt_lookup", "nested"), {}),
        (True, ("prompt_lookup", "nested"), {"drafter": "nested"}),
        (True, ("prompt_lookup",), {"exit_depth": 2}),
    ],
)
def test_what_only_the_worker_has_comes_from_the_worker(
    waits: Waits, adaptive: bool, drafters: tuple[str, ...], pinned: dict[str, object]
) -> None:
    remote = Slow(waits, 1e-3, drafters)
    local = LocalDraftSource(DrafterPool([PromptLookupDrafter()]))
    source = PlacedDraftSource(remote, local, adaptive=adaptive)
    source.open(session(0, [1, 2, 3]))
    assert set(_where(source, remote, 40, **pinned)) == {"worker"}


@pytest.mark.parametrize(
    "pinned", [{"drafter": "nested"}, {"exit_depth": 2}, {"drafter": "nested", "exit_depth": 4}]
)
def test_a_pinned_exit_is_drafted_where_free_drafts_are(waits: Waits, pinned: dict[str, object]) -> None:
    """A copy in the target may read its states, so that its drafts are better ones."""
    remote = Slow(waits, 2e-3, ("prompt_lookup", "nested"))
    local = LocalDraftSource(DrafterPool([PromptLookupDrafter(), Fixed("nested", 5, exits=(2, 4))]))
    source = PlacedDraftSource(remote, local)
    source.open(session(0, [1, 2, 3]))
    _where(source, remote, 16, **pinned)
    assert _where(source, remote, 100, **pinned).count("target") >= 95


def test_a_request_that_ends_takes_no_drafts_from_the_others(waits: Waits) -> None:
    """What leaves between rounds without an update is a close."""
    remote = Slow(waits, 2e-3, ("prompt_lookup",))
    source = PlacedDraftSource(remote, LocalDraftSource(DrafterPool([PromptLookupDrafter()])))
    source.open(session(0, [1, 2, 3]))
    _where(source, remote, 16)
    drafts = 0
    for _ in range(40):
        epoch = next(_epochs)
        source.submit([wish(0, epoch, new_tokens=(1,))])
        here = not remote.asked
        source.submit([])
        (draft,) = source.collect({0: epoch}, 0.1).values()
        assert (draft.drafter == "prompt_lookup") == here
        drafts += here
    assert drafts >= 30


def test_a_pool_without_drafters_takes_no_session() -> None:
    pool = DrafterPool([])
    with pytest.raises(DrafterError) as caught:
        pool.open(session(0, [1, 2]))
    assert caught.value.code == "unsupported"
    source = LocalDraftSource(pool)
    source.open(session(0, [1, 2]))
    source.submit([wish(0, 1)])
    assert source.collect({0: 1}, 0.1)[0].error == "unsupported"
