"""Where a replayed target's drafts come from: a trace behind the drafters' own seams, at the recorded cost.

`DrafterPool`, with its choice between drafters, is the one that serves. `TracedDrafter` stands in for the
nested model; drafters without a model run as they are, and cost nothing here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from actors.drafting.early_stop import EarlyStop
from actors.drafting.errors import DrafterError
from actors.drafting.interface import (
    NESTED,
    DraftQuery,
    ResetScope,
    ServedRounds,
    SessionDraft,
    SessionOpen,
    SessionUpdate,
)
from actors.drafting.selector import DrafterPool
from cluster.simulator.draft_pool import SimulatedDraftWorker
from cluster.simulator.events import Clock
from cluster.simulator.trace import NOTHING, Trace, TracedAnswer

WORKER_ID = "d0"


class ReplayClock:
    """Simulated seconds, moved on by whatever takes time."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@dataclass(slots=True)
class _Session:
    """`place` counts the tokens emitted so far."""

    answer: TracedAnswer
    place: int


class TracedDrafter:
    """A nested drafter that drafts what the recorded one did, in the time that it took.

    Args:
        early_stop: ends drafts by their recorded confidence, as the drafter that serves would.
    """

    name = NESTED
    learns = False

    def __init__(self, trace: Trace, clock: ReplayClock, early_stop: EarlyStop) -> None:
        self.exits = trace.card.exits
        self.busy_s = 0.0
        self._prices = SimulatedDraftWorker(Clock(), trace.card.step_s)
        self._step_s = trace.card.step_s
        self._clock = clock
        self._early_stop = early_stop
        self._waiting: dict[int, TracedAnswer] = {}
        self._sessions: dict[int, _Session] = {}

    def step_s_by_exit(self) -> Mapping[int, Mapping[int, float]]:
        return self._step_s

    def expect(self, session_id: int, answer: TracedAnswer) -> None:
        """The session that will be opened under this id goes through `answer`."""
        self._waiting[session_id] = answer

    def open(self, session: SessionOpen) -> None:
        answer = self._waiting.get(session.session_id)
        if answer is None:
            raise DrafterError("unsupported", f"no answer is recorded for session {session.session_id}")
        self._sessions[session.session_id] = _Session(answer, len(session.token_ids) - session.prompt_len)

    def commit(
        self,
        session_id: int,
        new_tokens: Sequence[int],
        candidates: Sequence[tuple[int, Sequence[int]]] = (),
    ) -> None:
        self._sessions[session_id].place += len(new_tokens)

    def propose(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
        drafts = [self._draft(query) for query in queries]
        wishes = [
            (d.exit_depth, 1, len(d.token_ids))
            for d in drafts
            if d.token_ids and d.exit_depth is not None
        ]  # fmt: skip
        if wishes:
            seconds = self._prices.seconds(wishes)
            self.busy_s += seconds
            self._clock.pass_by(seconds)
        return drafts

    def _draft(self, query: DraftQuery) -> SessionDraft:
        session = self._sessions[query.session_id]
        depth = self.exits[0] if query.exit_depth is None else query.exit_depth
        answer = session.answer
        if session.place >= len(answer.token_ids):
            return SessionDraft(query.session_id, query.epoch, drafter=self.name)
        tokens = answer.drafts[depth][session.place]
        confidence = answer.confidence[depth][session.place]
        length, survival = 0, 1.0
        while length < min(query.budget, len(tokens)) and tokens[length] != NOTHING:
            survival *= float(confidence[length])
            length += 1
            if self._early_stop.ends(survival):
                break
        return SessionDraft(
            query.session_id,
            query.epoch,
            tuple(tokens[:length].tolist()),
            drafter=self.name,
            exit_depth=depth,
            confidence=tuple(confidence[:length].tolist()),
        )

    def close(self, session_id: int) -> None:
        self._sessions.pop(session_id, None)
        self._waiting.pop(session_id, None)

    def reset(self, scope: ResetScope = "all") -> None:
        """Sessions share nothing."""


class ReplayedSource:
    """`DraftSource` with one draft worker that is `latency_s` away, in simulated time."""

    own_drafters: Collection[str] = ()
    wants_states = False

    def __init__(self, pool: DrafterPool, clock: ReplayClock, latency_s: float) -> None:
        self._pool, self._clock, self._latency_s = pool, clock, latency_s
        self._asked: dict[int, SessionUpdate] = {}
        self._shadows: list[SessionDraft] = []
        self.late_rounds = 0

    @property
    def drafters(self) -> Collection[str]:
        return self._pool.drafters

    @property
    def wants_candidates(self) -> int:
        return self._pool.wants_candidates

    def open(self, session: SessionOpen) -> None:
        self._pool.open(session)

    def submit(self, updates: Sequence[SessionUpdate], timeout_s: float = 0.0) -> None:
        self._asked = {}
        for update in updates:
            self._pool.apply(update)
            if update.budget > 0:
                self._asked[update.session_id] = update
        for update in updates:
            if update.nested is not None and update.nested.shadow_length:
                self._shadow(update)

    def _shadow(self, update: SessionUpdate) -> None:
        """Drafted while the target verifies: nobody waits."""
        now = self._clock.now
        draft = self._pool.shadow(update)
        self._clock.now = now
        if draft is not None:
            self._shadows.append(draft)

    def collect(self, wanted: Mapping[int, int], timeout_s: float) -> dict[int, SessionDraft]:
        """The target stands still for the drafting, but not past the timeout: late drafts are dropped."""
        started = self._clock.now
        drafts = self._pool.propose([self._asked[sid] for sid in wanted if sid in self._asked])
        self._clock.pass_by(self._latency_s)
        if self._clock.now - started > timeout_s:
            self._clock.now = started + timeout_s
            self.late_rounds += 1
            return {}
        return {d.session_id: d for d in drafts}

    def take_shadows(self) -> Sequence[SessionDraft]:
        taken, self._shadows = self._shadows, []
        return taken

    def assign(self, worker_id: str | None) -> None:
        """There is one worker."""

    def latency_s(self) -> Mapping[str, float]:
        return {WORKER_ID: self._latency_s}

    def served(self) -> ServedRounds:
        """Nothing of note: with one target at the worker no round waits for those of others."""
        return ServedRounds()

    def close_session(self, session_id: int) -> None:
        self._pool.close(session_id)

    def reset(self, scope: ResetScope = "all") -> None:
        self._pool.reset(scope)

    def stats(self) -> dict[str, object]:
        return {"kind": "replayed", "late_rounds": self.late_rounds}

    def close(self) -> None:
        """Holds nothing."""
