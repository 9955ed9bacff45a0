"""A target whose draft worker has no room, or is always late, drafts with what it has itself."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pytest

from actors.drafting.interface import SessionDraft, SessionOpen, SessionUpdate
from actors.drafting.local_source import LocalDraftSource
from actors.drafting.placed_source import PlacedDraftSource
from actors.drafting.prompt_lookup import PromptLookupDrafter
from actors.drafting.selector import DrafterPool
from tests.draft_rig import Worker, session, wish

TIMEOUT_S = 0.015
BOTH, NESTED_TOO = ("prompt_lookup",), ("prompt_lookup", "nested")


class Remote:
    """A connected worker. `late`: its drafts never come in time. `full`: it refuses every session, and is not
    asked for it again before `retry` rounds have passed. `broken`: sessions that it is never asked for."""

    connected = True
    wants_candidates = 0

    def __init__(self, clock: Clock, drafters: tuple[str, ...] = BOTH) -> None:
        self.drafters = drafters
        self.late = self.full = False
        self.retry = 8
        self.broken: set[int] = set()
        self.seconds = 1e-3
        self._clock = clock
        self._refused: dict[int, int] = {}
        self._round = 0
        self.asked: set[int] = set()

    def open(self, session: SessionOpen) -> None: ...

    def refuses(self, session_id: int) -> bool:
        return session_id in self.broken or self._refused.get(session_id, 0) > self._round

    def submit(self, updates: Sequence[SessionUpdate], timeout_s: float = 0.0) -> None:
        self._round += 1
        self.asked = {u.session_id for u in updates if u.budget > 0 and not self.refuses(u.session_id)}

    def collect(self, wanted: Mapping[int, int], timeout_s: float) -> dict[int, SessionDraft]:
        if not self.asked:
            return {}
        self._clock.now += TIMEOUT_S if self.late else self.seconds
        if self.late:
            return {}
        if self.full:
            self._refused |= dict.fromkeys(self.asked, self._round + self.retry)
            return {sid: SessionDraft(sid, wanted[sid], error="capacity") for sid in self.asked}
        return {sid: SessionDraft(sid, wanted[sid], (77,), drafter="nested") for sid in self.asked}

    def stats(self) -> dict[str, object]:
        return {}


class Clock:
    """In place of `time` in the module under test."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Rig:
    def __init__(self, remote: Remote, clock: Clock, *, adaptive: bool = True) -> None:
        self.remote, self.clock = remote, clock
        local = LocalDraftSource(DrafterPool([PromptLookupDrafter()]))
        self.source = PlacedDraftSource(remote, local, adaptive=adaptive)  # type: ignore[arg-type]
        self._epochs = itertools.count(1)
        for sid in (0, 1):
            self.source.open(session(sid, [1, 2, 3, 1, 2]))

    def rounds(self, count: int, sids: Sequence[int] = (0,), **pinned: object) -> list[str]:
        """Who drafted for the first session of each round: "worker", "target", "" for nobody."""
        places = []
        for _ in range(count):
            epoch = next(self._epochs)
            self.source.submit([wish(sid, epoch, [3, 1, 2], **pinned) for sid in sids], TIMEOUT_S)
            draft = self.source.collect(dict.fromkeys(sids, epoch), TIMEOUT_S).get(sids[0])
            tokens = draft.token_ids if draft is not None else ()
            places.append({(): "", (77,): "worker", (3, 1): "target"}[tokens])
        return places


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("actors.drafting.placed_source.time", clock)
    return clock


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("drafters", [BOTH, NESTED_TOO])
def test_sessions_that_a_full_worker_refuses_are_drafted_for_here(
    clock: Clock, drafters: tuple[str, ...], adaptive: bool
) -> None:
    remote = Remote(clock, drafters)
    remote.full = True
    rig = Rig(remote, clock, adaptive=adaptive)
    assert set(rig.rounds(40)) == {"target"}, "in the round that is refused too"
    assert remote._refused, "it is asked again now and then"
    remote.full = False
    if drafters == NESTED_TOO or not adaptive:
        assert set(rig.rounds(20)[8:]) == {"worker"}


def test_a_session_without_room_does_not_move_the_others(clock: Clock) -> None:
    remote = Remote(clock, NESTED_TOO)
    remote.broken = {1}
    rig = Rig(remote, clock)
    assert set(rig.rounds(20, (0, 1))) == {"worker"}
    assert set(rig.rounds(20, (1, 0))) == {"target"}


@pytest.mark.parametrize("good", [0, 40])
def test_a_worker_that_is_always_late_is_compared_all_the_same(clock: Clock, good: int) -> None:
    """From the start, or after it was the faster place."""
    remote = Remote(clock)
    rig = Rig(remote, clock)
    local_s = 2e-3  # of a local round, so that a good worker is preferred
    collect = rig.source._local.collect

    def slow(wanted: Mapping[int, int], timeout_s: float) -> dict[int, SessionDraft]:
        clock.now += local_s
        return collect(wanted, timeout_s)

    rig.source._local.collect = slow  # type: ignore[method-assign]
    if good:
        assert rig.rounds(good)[-8:].count("worker") >= 7
    remote.late = True
    rig.rounds(40)
    places = rig.rounds(300)
    assert places.count("target") >= 295
    assert "" in places, "the worker is tried again now and then"
    remote.late = False
    assert rig.rounds(600)[-100:].count("worker") >= 95


def test_what_only_a_late_worker_has_is_made_up_for(clock: Clock) -> None:
    """It is tried again seldom, and serves again as soon as it is in time."""
    remote = Remote(clock, NESTED_TOO)
    rig = Rig(remote, clock)
    assert set(rig.rounds(20)) == {"worker"}
    remote.late = True
    places = rig.rounds(400)
    assert places[:8] == [""] * 4 + ["target"] * 4
    assert 2 <= places[8:].count("") <= 8
    remote.late = False
    places = rig.rounds(300)
    back = places.index("worker")
    assert set(places[back:]) == {"worker"}
    remote.late = True
    assert rig.rounds(8) == [""] * 4 + ["target"] * 4


@pytest.mark.parametrize(
    ("adaptive", "pinned"), [(True, {"drafter": "nested"}), (True, {"exit_depth": 2}), (False, {})]
)
def test_nothing_replaces_what_is_pinned_or_kept_at_the_worker(
    clock: Clock, adaptive: bool, pinned: dict[str, object]
) -> None:
    remote = Remote(clock, NESTED_TOO)
    remote.late = True
    rig = Rig(remote, clock, adaptive=adaptive)
    assert set(rig.rounds(40, **pinned)) == {""}
    remote.late = False
    assert set(rig.rounds(40, **pinned)) == {"worker"}


def test_a_session_that_is_not_asked_for_says_nothing_of_the_worker(clock: Clock) -> None:
    remote = Remote(clock)
    remote.broken = {0}
    rig = Rig(remote, clock)
    rig.rounds(20, drafter="nested")
    assert rig.source.stats()["wait_ms"] == {"target": 0.0, "worker": 0.0}


def test_a_full_worker_leaves_no_request_without_drafts(worker: Worker, sources) -> None:  # type: ignore[no-untyped-def]
    """Over the wire: one place, two sessions."""
    worker.start(DrafterPool([PromptLookupDrafter()], max_sessions=1))
    source = PlacedDraftSource(
        sources(worker), LocalDraftSource(DrafterPool([PromptLookupDrafter()])), adaptive=False
    )
    for sid in (1, 2):
        source.open(session(sid, [1, 2, 3, 1, 2]))
    for epoch in range(1, 6):
        source.submit([wish(sid, epoch, [3, 1, 2]) for sid in (1, 2)], 10.0)
        drafts = source.collect({1: epoch, 2: epoch}, 10.0)
        assert [drafts[sid].token_ids for sid in (1, 2)] == [(3, 1), (3, 1)]
    assert source.stats()["fallback_rounds"] >= 1
