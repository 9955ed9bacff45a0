"""Drafts from drafters in this process: a target's fallback, and the whole source where there is no pool."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

from actors.drafting.errors import DrafterError
from actors.drafting.interface import SessionDraft, SessionOpen, SessionUpdate
from actors.drafting.selector import DrafterPool

logger = logging.getLogger(__name__)


class LocalDraftSource:
    """`DraftSource` over a `DrafterPool`, on the caller's thread.

    `submit` commits; drafting happens in `collect`, for the sessions it names, so that a session that is not
    collected costs nothing. One piece of background work (prompt prefill) is done a collect.
    """

    def __init__(self, pool: DrafterPool) -> None:
        self._pool = pool
        self._wishes: dict[int, SessionUpdate] = {}
        self._errors: dict[int, DrafterError] = {}
        self._open: set[int] = set()
        self._rounds = 0
        self._drafted = 0

    @property
    def drafters(self) -> Collection[str]:
        return self._pool.drafters

    @property
    def wants_candidates(self) -> int:
        return self._pool.wants_candidates

    def open(self, session: SessionOpen) -> None:
        self._open.add(session.session_id)
        try:
            self._pool.open(session)
            self._errors.pop(session.session_id, None)
        except DrafterError as error:
            logger.debug("session %d gets no local drafts: %s", session.session_id, error)
            self._errors[session.session_id] = error

    def submit(self, updates: Sequence[SessionUpdate]) -> None:
        self._rounds += bool(updates)
        for update in updates:
            if update.session_id in self._errors:
                self._wishes[update.session_id] = update
                continue
            try:
                self._pool.apply(update)
                self._wishes[update.session_id] = update
            except DrafterError as error:
                self._errors[update.session_id] = error

    def collect(self, wanted: Mapping[int, int], timeout_s: float) -> dict[int, SessionDraft]:
        """Draft for the last update of each wanted session; does not wait, so the timeout plays no part."""
        drafts: dict[int, SessionDraft] = {}
        asked: list[SessionUpdate] = []
        for sid, epoch in wanted.items():
            error = self._errors.get(sid)
            wish = self._wishes.get(sid)
            if error is not None:
                drafts[sid] = SessionDraft(sid, epoch, error=error.code, error_message=error.message)
            elif wish is not None and wish.epoch == epoch:
                asked.append(wish)
        for draft in self._pool.propose(asked):
            drafts[draft.session_id] = draft
            self._drafted += len(draft.token_ids)
        self._pool.work()
        return drafts

    def close_session(self, session_id: int) -> None:
        self._pool.close(session_id)
        self._open.discard(session_id)
        self._wishes.pop(session_id, None)
        self._errors.pop(session_id, None)

    def reset(self) -> None:
        self._pool.reset()

    def stats(self) -> dict[str, object]:
        return {
            "kind": "local",
            "drafters": list(self._pool.drafters),
            "sessions": self._pool.num_sessions,
            "rounds": self._rounds,
            "drafted_tokens": self._drafted,
        }

    def close(self) -> None:
        for sid in list(self._open):
            self.close_session(sid)
