"""Drafts from a draft worker or from drafters in this process, whichever is measured to be faster.

A drafter without a model guesses in microseconds; asking for it over a stream takes a round trip and several
thread switches. Which is better depends on the machine, so it is measured. What only the worker has (a nested
model) comes from the worker; what it cannot give because it is away, has no room or is always late is made up
for from here.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from actors.drafting.interface import (
    NESTED,
    DraftSource,
    ResetScope,
    ServedRounds,
    SessionDraft,
    SessionOpen,
    SessionUpdate,
)

_TRIALS = 8
"""Rounds that each place is given before the two are compared."""
_FIRST_EXPLORED, _EXPLORE_INTERVAL = 16, 256
"""The slower place is tried again after so many rounds, at doubling distances up to the second number."""
_RECENT = 4
"""A place is judged by the shortest of its last waits: whatever disturbs one only adds to it."""
_SWITCH = 0.8
"""The other place must take less than this share of the time, so that the choice does not flap."""
_LATE = 4
"""Rounds in a row for which the worker's drafts come too late, before others are used in their place. It is
tried again after so many rounds, at doubling distances up to `_EXPLORE_INTERVAL`."""


class ConnectedDraftSource(DraftSource, Protocol):
    """A source that may be away."""

    @property
    def connected(self) -> bool: ...

    def refuses(self, session_id: int) -> bool:
        """Whether the worker could not take the session, or draft for it, so lately that it is not asked."""
        ...


@dataclass(slots=True)
class _Place:
    """How long rounds stood still for drafts from here lately, in seconds."""

    rounds: int = 0
    waits: list[float] = field(default_factory=list)

    def observe(self, seconds: float) -> None:
        self.rounds += 1
        self.waits = [*self.waits[1 - _RECENT :], seconds]

    @property
    def wait_s(self) -> float:
        return min(self.waits, default=0.0)


@dataclass(slots=True)
class _Choice:
    """Where the rounds go that could go to either place."""

    local: _Place = field(default_factory=_Place)
    remote: _Place = field(default_factory=_Place)
    prefers_local: bool = False
    rounds: int = 0
    distance: int = _FIRST_EXPLORED
    explored_at: int = 0

    def next_is_local(self) -> bool:
        """The place of the coming round."""
        self.rounds += 1
        for place, local in ((self.remote, False), (self.local, True)):
            if place.rounds < _TRIALS:
                return local
        chosen, other = (self.local, self.remote) if self.prefers_local else (self.remote, self.local)
        if other.wait_s < _SWITCH * chosen.wait_s:
            self.prefers_local = not self.prefers_local
        if self.rounds - self.explored_at < self.distance:
            return self.prefers_local
        self.explored_at = self.rounds
        self.distance = min(_EXPLORE_INTERVAL, 2 * self.distance)
        return not self.prefers_local


@dataclass(slots=True)
class _Patience:
    """Whether to wait for what only the worker has. `late`: rounds in a row that it was late for; `passed`:
    rounds that did without it since."""

    late: int = 0
    passed: int = 0
    distance: int = _LATE

    def observe(self, *, late: bool) -> None:
        self.late = self.late + 1 if late else 0
        if not late:
            self.passed, self.distance = 0, _LATE

    def passes_over(self) -> bool:
        """Whether the coming round does without."""
        if self.late < _LATE:
            return False
        self.passed += 1
        if self.passed <= self.distance:
            return True
        self.passed, self.distance = 0, min(_EXPLORE_INTERVAL, 2 * self.distance)
        return False


class PlacedDraftSource:
    """`DraftSource` over `remote` and `local`, which is told of every session too.

    Args:
        adaptive: whether sessions may be drafted for here where that is faster, or where the remote is late
            again and again. Otherwise the local source is asked only while the remote is not connected, and
            for sessions that it refuses.
    """

    def __init__(self, remote: ConnectedDraftSource, local: DraftSource, *, adaptive: bool = True) -> None:
        self._remote = remote
        self._local = local
        self._adaptive = adaptive
        self._choice = _Choice()
        self._patience = _Patience()
        self._here: set[int] = set()
        """Sessions whose coming draft is made here."""
        self._fallback_rounds = 0

    @property
    def drafters(self) -> Collection[str]:
        return tuple(dict.fromkeys((*self._remote.drafters, *self._local.drafters)))

    @property
    def own_drafters(self) -> Collection[str]:
        return self._local.own_drafters

    @property
    def wants_candidates(self) -> int:
        return max(self._remote.wants_candidates, self._local.wants_candidates)

    @property
    def wants_states(self) -> bool:
        return self._local.wants_states

    def open(self, session: SessionOpen) -> None:
        self._remote.open(session)
        self._local.open(session)

    def submit(self, updates: Sequence[SessionUpdate], timeout_s: float = 0.0) -> None:
        if updates:
            self._place(updates)  # without any it is closes that leave; what was asked for is still to come
        self._remote.submit([self._for_remote(update) for update in updates], timeout_s)
        self._local.submit(updates, timeout_s)

    def _place(self, updates: Sequence[SessionUpdate]) -> None:
        asking = [u for u in updates if u.budget > 0 and self._served_here(u)]
        here = {u.session_id for u in asking if self._remote.refuses(u.session_id)}
        either = {u.session_id for u in asking if self._served_by_both(u)} - here
        # A draft that reads the target's states guesses better than the same one without, in a worker.
        if either and (self._local.wants_states or self._choice.next_is_local()):
            here |= either
        better_there = {u.session_id for u in asking} - here - either
        if better_there and self._adaptive and self._patience.passes_over():
            here |= better_there
        self._here = here

    def _served_here(self, update: SessionUpdate) -> bool:
        """Whether the local source has what the session pins, or anything where it pins nothing."""
        if update.drafter is not None or update.exit_depth is not None:
            return (update.drafter or NESTED) in self._local.drafters
        return bool(self._local.drafters)

    def _served_by_both(self, update: SessionUpdate) -> bool:
        if not self._adaptive or not self._remote.connected:
            return False
        if update.drafter is not None or update.exit_depth is not None:
            return self._served_here(update)
        wanted = set(self._remote.drafters)
        if update.nested is not None and update.nested.cap == 0:  # passed over: the others decide
            wanted.discard(NESTED)
        return bool(wanted) and wanted <= set(self._local.drafters)

    def _for_remote(self, update: SessionUpdate) -> SessionUpdate:
        budget = 0 if update.session_id in self._here else update.budget
        if budget == update.budget and not update.states:
            return update
        return replace(update, budget=budget, states=())

    def collect(self, wanted: Mapping[int, int], timeout_s: float) -> dict[int, SessionDraft]:
        """A remote that is late costs its round: a local draft would come later still."""
        here = {sid: epoch for sid, epoch in wanted.items() if sid in self._here}
        there = {sid: epoch for sid, epoch in wanted.items() if sid not in self._here}
        drafts: dict[int, SessionDraft] = {}
        if here:
            started = time.perf_counter()
            drafts.update(self._local.collect(here, timeout_s))
            # A round that absorbed a piece of a prompt instead of drafting says nothing of later ones.
            if _drafted(drafts, here):
                self._choice.local.observe(time.perf_counter() - started)
        if there:
            started = time.perf_counter()
            drafts.update(self._remote.collect(there, timeout_s))
            waited = time.perf_counter() - started
            connected = self._remote.connected
            if connected:
                late = drafts.keys().isdisjoint(there) and not all(map(self._remote.refuses, there))
                self._patience.observe(late=late)
                if late or _drafted(drafts, there):
                    self._choice.remote.observe(max(waited, timeout_s) if late else waited)
            self._fall_back(there, drafts, timeout_s, away=not connected)
        return drafts

    def _fall_back(
        self, wanted: Mapping[int, int], drafts: dict[int, SessionDraft], timeout_s: float, *, away: bool
    ) -> None:
        """Make up for what the remote refused, and for what it did not answer if it is away."""
        missing = {
            sid: epoch
            for sid, epoch in wanted.items()
            if (away if sid not in drafts else drafts[sid].error is not None)
        }
        if not missing:
            return
        self._fallback_rounds += 1
        for sid, draft in self._local.collect(missing, timeout_s).items():
            if draft.error is None:
                drafts[sid] = draft
            elif sid not in drafts:
                # Only the remote has the drafter that is pinned: no draft for now, but no error either.
                drafts[sid] = SessionDraft(sid, draft.epoch) if draft.error == "unsupported" else draft

    def take_shadows(self) -> Sequence[SessionDraft]:
        return self._remote.take_shadows()

    def assign(self, worker_id: str | None) -> None:
        self._remote.assign(worker_id)

    def latency_s(self) -> Mapping[str, float]:
        return self._remote.latency_s()

    def served(self) -> ServedRounds:
        return self._remote.served()

    def close_session(self, session_id: int) -> None:
        self._remote.close_session(session_id)
        self._local.close_session(session_id)

    def reset(self, scope: ResetScope = "all") -> None:
        self._remote.reset(scope)
        self._local.reset(scope)

    def stats(self) -> dict[str, object]:
        """Waits in ms, the shortest of the last; `prefers`: where sessions go that both can serve."""
        choice = self._choice
        return {
            "kind": "placed",
            "prefers": "target" if choice.prefers_local else "worker",
            "wait_ms": {
                "target": round(choice.local.wait_s * 1e3, 3),
                "worker": round(choice.remote.wait_s * 1e3, 3),
            },
            "fallback_rounds": self._fallback_rounds,
            "remote": self._remote.stats(),
            "local": self._local.stats(),
        }

    def close(self) -> None:
        self._remote.close()
        self._local.close()


def _drafted(drafts: Mapping[int, SessionDraft], wanted: Iterable[int]) -> bool:
    return any(drafts[sid].token_ids for sid in wanted if sid in drafts)
