"""What a target knows of its sessions on one draft worker: builds round messages, reads replies. No I/O.

Epochs on the wire are the ledger's own: rounds that need no message (budget 0) and rounds lost with a
connection do not exist for the worker, whose rule is that epochs follow one another without gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from actors.drafting import codec
from actors.drafting.interface import (
    MAX_HELD_CANDIDATES,
    ResetScope,
    SessionDraft,
    SessionOpen,
    SessionUpdate,
)
from actors.sampling.params import DraftSampling
from protos.s2d.v1 import drafting_pb2 as pb

RETRY_S = 1.0
"""A session that the worker had no room for, or failed on, is not asked for again before this long."""
MAX_OPEN_TOKENS = 1 << 18
"""Tokens of opened sessions in one message; sessions past it are opened by a later round."""


@dataclass(slots=True)
class _Session:
    """`tokens` is the whole sequence. `unsent` of its last tokens are not known to the worker. `wire_epoch`
    is the last one used; `asked` the caller's epoch that its answer belongs to, None when no draft is wanted;
    `open_epoch` the wire epoch of the last open, answers up to which belong to a former life. `shadow`: (wire
    epoch, caller's epoch) of a draft for scoring that is under way. `drafted`: of the first update since the
    last message, which is the verdict on what the worker proposed."""

    tokens: list[int]
    prompt_len: int
    sampling: DraftSampling
    trees: bool
    opened: bool = False
    wire_epoch: int = 0
    open_epoch: int = -1
    asked: int | None = None
    shadow: tuple[int, int] | None = None
    unsent: int = 0
    candidates: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    drafted: int | None = None
    retry_at: float = 0.0


class SessionLedger:
    """Args:
    flush_tokens: tokens that a session without a wish accumulates before they are sent anyway.
    """

    def __init__(self, flush_tokens: int = 64) -> None:
        if flush_tokens < 1:
            raise ValueError("flush_tokens must be positive")
        self._flush_tokens = flush_tokens
        self._sessions: dict[int, _Session] = {}
        self._closes: list[int] = []
        self._reset: ResetScope | None = None

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, session: SessionOpen) -> None:
        """Remember a session; the worker is told when a draft is first wanted."""
        self.close(session.session_id)
        self._sessions[session.session_id] = _Session(
            list(session.token_ids), session.prompt_len, session.sampling, session.trees
        )

    def close(self, session_id: int) -> None:
        session = self._sessions.pop(session_id, None)
        if session is not None and session.opened:
            self._closes.append(session_id)

    def reset(self, scope: ResetScope = "all") -> None:
        """Ask the worker, with the next message, to forget what sessions share."""
        if self._reset != "all":
            self._reset = scope

    def disconnected(self) -> None:
        """The worker's sessions ended with the stream: open them again when next wanted."""
        self._closes.clear()
        for session in self._sessions.values():
            session.opened = False
            session.asked = session.shadow = None

    def awaits(self, session_id: int, epoch: int) -> bool:
        """Whether an answer to the caller's `epoch` is under way."""
        session = self._sessions.get(session_id)
        return session is not None and session.asked == epoch

    def refused(self, session_id: int, now: float) -> bool:
        """Whether the session is not asked for yet: see `RETRY_S`. `now` as for `round`."""
        session = self._sessions.get(session_id)
        return session is not None and now < session.retry_at

    def record(self, updates: Sequence[SessionUpdate]) -> None:
        """Keep tokens in step while there is nobody to send to."""
        for update in updates:
            session = self._sessions.get(update.session_id)
            if session is not None:
                session.tokens.extend(update.new_tokens)
                session.asked = None

    def round(self, updates: Sequence[SessionUpdate], now: float) -> pb.DraftRound | None:
        """One message for all updates, closes and resets due; None when there is nothing to say.

        `now` is monotonic time in seconds. The caller fills in round_id and deadline.
        """
        message = pb.DraftRound()
        open_tokens = 0
        for update in updates:
            session = self._sessions.get(update.session_id)
            if session is None:
                continue
            self._absorb(session, update)
            may_ask = now >= session.retry_at
            wants = update.budget > 0 and may_ask
            shadows = update.nested is not None and update.nested.shadow_length > 0 and may_ask
            if not session.opened:
                if not (wants or shadows) or (
                    open_tokens and open_tokens + len(session.tokens) > MAX_OPEN_TOKENS
                ):
                    continue
                open_tokens += len(session.tokens)
                message.opens.append(self._open_message(update.session_id, session))
            elif not (wants or shadows) and session.unsent < self._flush_tokens:
                continue
            message.updates.append(self._update_message(session, update, wants, shadows))
        self._add_pending(message)
        return message if message.updates or message.closes or message.reset_shared_state else None

    def flush(self) -> pb.DraftRound | None:
        """Closes and resets that no round has taken along; None when there are none."""
        return self.round((), 0.0)

    def answer(self, draft: pb.SessionDraft, now: float) -> SessionDraft | None:
        """A reply's draft with the caller's epoch; None when it is stale or nobody asked."""
        session = self._sessions.get(draft.session_id)
        if session is None or draft.epoch <= session.open_epoch:
            return None
        if draft.error in (pb.DRAFT_ERROR_UNKNOWN_SESSION, pb.DRAFT_ERROR_STALE_EPOCH):
            session.opened = False
        elif draft.error in (pb.DRAFT_ERROR_CAPACITY, pb.DRAFT_ERROR_INTERNAL):
            session.retry_at = now + RETRY_S
        if draft.epoch != session.wire_epoch or session.asked is None:
            return None
        epoch, session.asked = session.asked, None
        return _decoded(draft, epoch)

    def shadow(self, draft: pb.SessionDraft) -> SessionDraft | None:
        """A draft for scoring with the caller's epoch; None when nobody waits for it."""
        session = self._sessions.get(draft.session_id)
        if session is None or session.shadow is None or session.shadow[0] != draft.epoch:
            return None
        epoch, session.shadow = session.shadow[1], None
        return _decoded(draft, epoch)

    def _absorb(self, session: _Session, update: SessionUpdate) -> None:
        session.tokens.extend(update.new_tokens)
        session.unsent += len(update.new_tokens)
        session.candidates.extend(update.candidates)
        del session.candidates[:-MAX_HELD_CANDIDATES]
        if session.drafted is None:  # the updates after it are verdicts on what others drafted, or on nothing
            session.drafted = update.drafted
        session.asked = None

    def _open_message(self, session_id: int, session: _Session) -> pb.SessionOpen:
        session.opened = True
        session.open_epoch = session.wire_epoch
        session.unsent = session.drafted = 0
        return codec.open_to_proto(
            SessionOpen(
                session_id,
                tuple(session.tokens),
                session.prompt_len,
                session.sampling,
                session.wire_epoch,
                session.trees,
            )
        )

    def _update_message(
        self, session: _Session, update: SessionUpdate, wants: bool, shadows: bool
    ) -> pb.SessionUpdate:
        session.wire_epoch += 1
        if shadows:
            session.shadow = (session.wire_epoch, update.epoch)
        session.asked = update.epoch if wants else None
        message = codec.update_to_proto(
            replace(
                update,
                epoch=session.wire_epoch,
                new_tokens=tuple(session.tokens[len(session.tokens) - session.unsent :]),
                budget=update.budget if wants else 0,
                drafted=session.drafted or 0,
                candidates=tuple(session.candidates),
            )
        )
        session.unsent = 0
        session.drafted = None
        session.candidates.clear()
        return message

    def _add_pending(self, message: pb.DraftRound) -> None:
        message.closes.extend(self._closes)
        self._closes.clear()
        if self._reset is not None:
            message.reset_shared_state = codec.RESET_SCOPES[self._reset]
            self._reset = None


def _decoded(draft: pb.SessionDraft, epoch: int) -> SessionDraft:
    """A draft that makes no sense counts as one that failed: the stream and its other sessions go on."""
    try:
        return codec.draft_from_proto(draft, epoch)
    except ValueError as error:
        return SessionDraft(draft.session_id, epoch, error="internal", error_message=str(error))
