"""Drafts from a draft worker over gRPC: one message a round, and never a wait past the round's deadline."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Mapping, Sequence

from actors.drafting.interface import (
    ResetScope,
    ServedRounds,
    SessionDraft,
    SessionOpen,
    SessionUpdate,
    TargetIdentity,
)
from actors.drafting.remote_link import (
    Connection,
    LeaseProvider,
    LinkOptions,
    RemoteLink,
)
from actors.drafting.session_ledger import SessionLedger
from actors.drafting.tree import depths, parents_of
from protos.s2d.v1 import drafting_pb2 as pb

logger = logging.getLogger(__name__)

_MAX_WORKERS = 64
"""Draft workers whose latency is remembered."""
_AVERAGE_WEIGHT = 0.05
"""Weight of the newest round in the averages of `stats`."""
_LONGEST_S = 0.1
"""A round counts as no longer at a worker: it waits for less, unless its drafts are forced."""


class RemoteDraftSource:
    """`DraftSource` over one stream to the assigned draft worker, otherwise to the least loaded one.

    Called from one engine thread; the link's threads meet it in a condition. Sessions are opened on the
    worker when a draft is first wanted, and again, with all their tokens, after a reconnect or when the
    worker does not know them. When the stream is stuck or gone, rounds go without drafts.

    Args:
        leases: the draft workers there are now; called from the link's thread, may block for a while.
        identity: of this target worker.
        options: see `LinkOptions`.
        expected_drafters: names that requests may pin before the first connection.
        expected_candidates: candidates wanted per row before the first connection.
        flush_tokens: see `SessionLedger`.
    """

    def __init__(
        self,
        leases: LeaseProvider,
        identity: TargetIdentity,
        options: LinkOptions | None = None,
        *,
        expected_drafters: Collection[str] = (),
        expected_candidates: int = 0,
        flush_tokens: int = 64,
    ) -> None:
        self._changed = threading.Condition()
        self._ledger = SessionLedger(flush_tokens)
        self._connection: Connection | None = None
        self._drafts: dict[int, SessionDraft] = {}
        self._shadows: list[SessionDraft] = []
        self._latency_s: dict[str, float] = {}
        self._drafters = tuple(expected_drafters)
        self._candidates = expected_candidates
        self._rounds = self._late = self._connects = self._dropped = 0
        self._round_trip_s: float | None = None
        self._service_s: float | None = None
        self._draft_s = 0.0
        self._served = ServedRounds()
        self._last_error = ""
        self._link = RemoteLink(leases, identity, options or LinkOptions(), self)
        self._link.start()

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def refuses(self, session_id: int) -> bool:
        """Whether the worker had no room for the session, or failed on it, so lately that it is not asked."""
        with self._changed:
            return self._ledger.refused(session_id, time.monotonic())

    @property
    def drafters(self) -> Collection[str]:
        return self._drafters

    @property
    def own_drafters(self) -> Collection[str]:
        return ()

    @property
    def wants_states(self) -> bool:
        """A worker drafts without: a state a token would outweigh everything else that crosses the wire."""
        return False

    @property
    def wants_candidates(self) -> int:
        return self._candidates

    def open(self, session: SessionOpen) -> None:
        with self._changed:
            self._ledger.open(session)
            self._drafts.pop(session.session_id, None)

    def submit(self, updates: Sequence[SessionUpdate], timeout_s: float = 0.0) -> None:
        with self._changed:
            for update in updates:
                self._drafts.pop(update.session_id, None)
            if self._connection is None:
                self._ledger.record(updates)
                return
            message = self._ledger.round(updates, time.monotonic())
            if message is not None:
                self._rounds += 1
                message.deadline_us = int(timeout_s * 1e6)
                self._send(self._connection, message)

    def collect(self, wanted: Mapping[int, int], timeout_s: float) -> dict[int, SessionDraft]:
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while any(self._ledger.awaits(sid, epoch) for sid, epoch in wanted.items()):
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    self._late += 1
                    break
                self._changed.wait(remaining)
            drafts = {sid: self._drafts.pop(sid) for sid in wanted if sid in self._drafts}
        return {sid: draft for sid, draft in drafts.items() if draft.epoch == wanted[sid]}

    def take_shadows(self) -> Sequence[SessionDraft]:
        with self._changed:
            shadows, self._shadows = self._shadows, []
        return shadows

    def assign(self, worker_id: str | None) -> None:
        """Takes effect when the link next looks at the leases, within a second."""
        self._link.prefer(worker_id)

    def latency_s(self) -> Mapping[str, float]:
        with self._changed:
            return dict(self._latency_s)

    def served(self) -> ServedRounds:
        return self._served

    def close_session(self, session_id: int) -> None:
        with self._changed:
            self._ledger.close(session_id)
            self._drafts.pop(session_id, None)

    def reset(self, scope: ResetScope = "all") -> None:
        with self._changed:
            self._ledger.reset(scope)

    def stats(self) -> dict[str, object]:
        """Averages are exponential, in milliseconds; None before the first round. `draft_s`: seconds that the
        worker has spent on our rounds so far."""
        with self._changed:
            connection = self._connection
            return {
                "kind": "remote",
                "connected": connection is not None,
                "worker_id": connection.worker_id if connection else None,
                "address": connection.address if connection else None,
                "incarnation": connection.incarnation if connection else None,
                "sessions": len(self._ledger),
                "rounds": self._rounds,
                "late_rounds": self._late,
                "dropped_rounds": self._dropped,
                "reconnects": max(0, self._connects - 1),
                "round_trip_ms": _milliseconds(self._round_trip_s),
                "service_ms": _milliseconds(self._service_s),
                "draft_s": self._draft_s,
                "last_error": self._last_error,
            }

    def close(self) -> None:
        self._link.close()

    def link_up(self, connection: Connection, hello: pb.DraftReply) -> None:
        with self._changed:
            self._connection = connection
            self._drafters = tuple(hello.drafters)
            self._candidates = hello.candidates_wanted
            self._connects += 1
            self._last_error = ""
        logger.info("drafting with worker %s at %s", connection.worker_id, connection.address)

    def link_down(self, connection: Connection, reason: str) -> None:
        with self._changed:
            self._last_error = reason
            self._lost(connection)
        logger.info("draft worker at %s: %s", connection.address, reason)

    def link_reply(self, connection: Connection, reply: pb.DraftReply) -> None:
        with self._changed:
            if connection is not self._connection:
                return
            waited = connection.answered(reply.round_id)
            if waited is not None:
                self._round_trip_s = _average(self._round_trip_s, waited)
                self._service_s = _average(self._service_s, reply.service_us * 1e-6)
                self._draft_s += reply.service_us * 1e-6
                self._observe_latency(connection.worker_id, max(0.0, waited - reply.service_us * 1e-6))
            self._candidates = reply.candidates_wanted
            now = time.monotonic()
            self._shadows += [s for draft in reply.shadows if (s := self._ledger.shadow(draft)) is not None]
            answers = [a for draft in reply.drafts if (a := self._ledger.answer(draft, now)) is not None]
            self._drafts.update((answer.session_id, answer) for answer in answers)
            if waited is not None and not all(draft.error for draft in reply.drafts):
                self._served = _plus(self._served, reply.service_us * 1e-6, answers)
            self._changed.notify_all()

    def _observe_latency(self, worker_id: str, seconds: float) -> None:
        before = self._latency_s.pop(worker_id, None)
        self._latency_s[worker_id] = _average(before, seconds)
        while len(self._latency_s) > _MAX_WORKERS:
            del self._latency_s[next(iter(self._latency_s))]

    def link_idle(self, connection: Connection) -> None:
        with self._changed:
            if connection is self._connection:
                message = self._ledger.flush()
                if message is not None:
                    self._send(connection, message)

    def _send(self, connection: Connection, message: pb.DraftRound) -> None:
        if not connection.send(message):
            self._dropped += 1
            self._last_error = "the send queue was full"
            self._lost(connection)
            connection.cancel()

    def _lost(self, connection: Connection) -> None:
        if connection is self._connection:
            self._connection = None
            self._ledger.disconnected()
            self._changed.notify_all()


def _plus(served: ServedRounds, seconds: float, answers: Sequence[SessionDraft]) -> ServedRounds:
    """One round more. Of a tree in which a nested draft is all tokens count, whoever guessed them."""
    nested = [answer for answer in answers if answer.exit_depth is not None]
    return ServedRounds(
        served.rounds + 1,
        served.seconds + min(seconds, _LONGEST_S),
        served.steps + max((max(depths(parents_of(a)), default=0) for a in nested), default=0),
        served.tokens + sum(len(a.token_ids) for a in nested),
    )


def _average(average: float | None, value: float) -> float:
    return value if average is None else average + _AVERAGE_WEIGHT * (value - average)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 4)
