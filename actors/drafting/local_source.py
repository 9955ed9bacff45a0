"""Drafts from drafters in this process: a target's fallback, and the whole source where there is no pool."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from actors.drafting.errors import DrafterError
from actors.drafting.interface import (
    MAX_HELD_CANDIDATES,
    MAX_HELD_STATES,
    ResetScope,
    ServedRounds,
    SessionDraft,
    SessionOpen,
    SessionUpdate,
)
from actors.drafting.selector import DrafterPool
from actors.models.runner import StateRow

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Session:
    """What the drafters have not been told yet. `epoch` is the pool's; `wish` the last update; `drafted` that
    of the first, which is the verdict on what was proposed here."""

    opening: SessionOpen | None
    epoch: int = 0
    tokens: list[int] = field(default_factory=list)
    candidates: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    states: list[StateRow] = field(default_factory=list)
    wish: SessionUpdate | None = None
    drafted: int | None = None
    error: DrafterError | None = None


class LocalDraftSource:
    """`DraftSource` over a `DrafterPool`, on the caller's thread.

    `open` and `submit` only take notes. The drafters are told, and asked, in `collect`, so that a source that
    is not collected from (a fallback) costs next to nothing. One piece of background work (prompt prefill) is
    done a collect.
    """

    def __init__(self, pool: DrafterPool) -> None:
        self._pool = pool
        self._sessions: dict[int, _Session] = {}
        self._rounds = 0
        self._drafted = 0
        self._draft_s = 0.0

    @property
    def drafters(self) -> Collection[str]:
        return self._pool.drafters

    @property
    def own_drafters(self) -> Collection[str]:
        return self._pool.drafters

    @property
    def wants_candidates(self) -> int:
        return self._pool.wants_candidates

    @property
    def wants_states(self) -> bool:
        return self._pool.wants_states

    def open(self, session: SessionOpen) -> None:
        self._sessions[session.session_id] = _Session(replace(session, epoch=0))

    def submit(self, updates: Sequence[SessionUpdate], timeout_s: float = 0.0) -> None:
        self._rounds += bool(updates)
        for update in updates:
            session = self._sessions.get(update.session_id)
            if session is None:
                continue
            session.tokens.extend(update.new_tokens)
            session.candidates.extend(update.candidates)
            del session.candidates[:-MAX_HELD_CANDIDATES]
            if len(update.states) < len(update.new_tokens):
                session.states.clear()  # what is handed on are the states of the last tokens
            session.states.extend(update.states)
            del session.states[:-MAX_HELD_STATES]
            session.wish = update
            if session.drafted is None:
                session.drafted = update.drafted

    def collect(self, wanted: Mapping[int, int], timeout_s: float) -> dict[int, SessionDraft]:
        """Draft for the last update of each wanted session; does not wait, so the timeout plays no part."""
        started = time.perf_counter()
        drafts: dict[int, SessionDraft] = {}
        asked: list[SessionUpdate] = []
        for sid, epoch in wanted.items():
            session = self._sessions.get(sid)
            if session is None or session.wish is None or session.wish.epoch != epoch:
                continue
            if session.error is None:
                try:
                    asked.append(self._tell(session, session.wish))
                    continue
                except DrafterError as error:
                    logger.debug("session %d gets no local drafts: %s", sid, error)
                    session.error = error
            code, message = session.error.code, session.error.message
            drafts[sid] = SessionDraft(sid, epoch, error=code, error_message=message)
        # The caller's other sequences wait too, whether they are decoding already or will be.
        for draft in self._pool.propose(asked, together=len(self._sessions)):
            drafts[draft.session_id] = replace(draft, epoch=wanted[draft.session_id])
            self._drafted += len(draft.token_ids)
        self._pool.work()
        self._draft_s += time.perf_counter() - started
        return drafts

    def _tell(self, session: _Session, wish: SessionUpdate) -> SessionUpdate:
        """Bring the pool up to date with a session, and return the wish in the pool's epoch. Raises
        `DrafterError`, after which the session is lost here."""
        if session.opening is not None:
            self._pool.open(session.opening)
            session.opening = None
        session.epoch += 1
        told = replace(
            wish,
            epoch=session.epoch,
            new_tokens=tuple(session.tokens),
            drafted=session.drafted or 0,
            candidates=tuple(session.candidates),
            states=tuple(session.states),
        )
        session.drafted = None
        session.tokens.clear()
        session.candidates.clear()
        session.states.clear()
        self._pool.apply(told)
        return told

    def take_shadows(self) -> Sequence[SessionDraft]:
        """None: drafting for scoring would hold up the caller's thread."""
        return ()

    def assign(self, worker_id: str | None) -> None:
        """There is no draft worker to choose."""

    def latency_s(self) -> Mapping[str, float]:
        return {}

    def served(self) -> ServedRounds:
        return ServedRounds()

    def close_session(self, session_id: int) -> None:
        self._pool.close(session_id)
        self._sessions.pop(session_id, None)

    def reset(self, scope: ResetScope = "all") -> None:
        self._pool.reset(scope)

    def stats(self) -> dict[str, object]:
        return {
            "kind": "local",
            "drafters": list(self._pool.drafters),
            "sessions": len(self._sessions),
            "rounds": self._rounds,
            "drafted_tokens": self._drafted,
            "draft_s": self._draft_s,
        }

    def close(self) -> None:
        for sid in list(self._sessions):
            self.close_session(sid)
