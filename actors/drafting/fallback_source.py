"""A remote source of drafts with a local one that takes over while the remote is away."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from actors.drafting.interface import DraftSource, SessionDraft, SessionOpen, SessionUpdate


class ConnectedDraftSource(DraftSource, Protocol):
    """A source that may be away."""

    @property
    def connected(self) -> bool: ...


class FallbackDraftSource:
    """`DraftSource` that prefers `remote` and tells `local` of every session too.

    The local source is asked only for sessions without an answer while the remote is not connected: a remote
    that is merely late costs its round, because drafting here would take the target's own cores.
    """

    def __init__(self, remote: ConnectedDraftSource, local: DraftSource) -> None:
        self._remote = remote
        self._local = local
        self._fallback_rounds = 0

    @property
    def drafters(self) -> Collection[str]:
        return tuple(dict.fromkeys((*self._remote.drafters, *self._local.drafters)))

    @property
    def wants_candidates(self) -> int:
        return max(self._remote.wants_candidates, self._local.wants_candidates)

    def open(self, session: SessionOpen) -> None:
        self._remote.open(session)
        self._local.open(session)

    def submit(self, updates: Sequence[SessionUpdate], timeout_s: float = 0.0) -> None:
        self._remote.submit(updates, timeout_s)
        self._local.submit(updates, timeout_s)

    def collect(self, wanted: Mapping[int, int], timeout_s: float) -> dict[int, SessionDraft]:
        drafts = self._remote.collect(wanted, timeout_s)
        if len(drafts) == len(wanted) or self._remote.connected:
            return drafts
        missing = {sid: epoch for sid, epoch in wanted.items() if sid not in drafts}
        for sid, draft in self._local.collect(missing, timeout_s).items():
            # Only the remote has the drafter that is pinned: no draft for now, but no error either.
            drafts[sid] = SessionDraft(sid, draft.epoch) if draft.error == "unsupported" else draft
        self._fallback_rounds += bool(missing)
        return drafts

    def close_session(self, session_id: int) -> None:
        self._remote.close_session(session_id)
        self._local.close_session(session_id)

    def reset(self) -> None:
        self._remote.reset()
        self._local.reset()

    def stats(self) -> dict[str, object]:
        return {
            "kind": "fallback",
            "fallback_rounds": self._fallback_rounds,
            "remote": self._remote.stats(),
            "local": self._local.stats(),
        }

    def close(self) -> None:
        self._remote.close()
        self._local.close()
