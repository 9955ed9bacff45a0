"""The drafting thread: takes the waiting rounds of all target workers and serves them as one batch."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from actors.draft_worker.fair_queue import FairQueue
from actors.drafting import codec
from actors.drafting.draft_ahead import AheadCounts
from actors.drafting.errors import DrafterError
from actors.drafting.interface import SCOPE_SHIFT, ResetScope, SessionDraft, SessionOpen, SessionUpdate
from actors.drafting.selector import DrafterPool
from actors.turn_watch import TurnWatch

logger = logging.getLogger(__name__)

ReplyCallback = Callable[[list[SessionDraft]], None]
_IDLE_S = 0.25
MAX_BATCH_TOKENS = 256
"""Draft tokens of the rounds that are drafted together, at most; a single round may have more."""
TURN_LIMIT_S = 120.0
"""Longest turn of the drafting thread; one that takes longer hangs. An engine's step has as long."""


@dataclass(frozen=True, slots=True)
class Round:
    """One target worker's message, decoded, its session ids scoped to the stream (`DraftBatcher.attach`).

    `deadline` is monotonic time in seconds after which drafts are useless (infinite for none). `reply` is
    called once, from the drafting thread or from `submit`, unless the stream ends before.
    """

    stream_id: int
    reply: ReplyCallback
    opens: tuple[SessionOpen, ...] = ()
    closes: tuple[int, ...] = ()
    updates: tuple[SessionUpdate, ...] = ()
    reset: ResetScope | None = None
    deadline: float = float("inf")
    shadow_reply: ReplyCallback | None = None
    """Called at most once, after `reply`, with a draft for scoring, empty when there is none."""


@dataclass(frozen=True, slots=True)
class BatcherState:
    sessions: int
    streams: int
    queued_rounds: int
    kv_blocks_used: int
    kv_blocks_free: int
    rounds: int
    drafted_tokens: int
    busy_s: float = 0.0
    """Seconds since start that the drafting thread drafted, background work not included."""
    ahead: AheadCounts = field(default_factory=AheadCounts)
    healthy: bool = True
    """False when the drafting thread has ended, hangs, or its batches keep failing."""
    failing: tuple[str, ...] = ()
    """Drafters that fail whatever session they draft for."""


@dataclass(slots=True, eq=False)
class _Answers:
    """Replies of one round, and what is to be drafted for them, by place of its updates."""

    round: Round
    drafts: dict[int, SessionDraft] = field(default_factory=dict)
    asked: dict[int, SessionUpdate] = field(default_factory=dict)

    def give_up(self, session_id: int) -> None:
        """A wish that nobody waits for any more gets an empty draft."""
        for place in [place for place, update in self.asked.items() if update.session_id == session_id]:
            update = self.asked.pop(place)
            self.drafts[place] = SessionDraft(update.session_id, update.epoch)


class DraftBatcher:
    """Owns a `DrafterPool` and the thread that drives it.

    A round is answered by one reply, with a draft for each update that has a budget or an error, at once
    where all of them are prepared. Of the rounds that wait, those go together whose turn it is (`FairQueue`),
    up to `max_batch_tokens` draft tokens, so that a target with many requests cannot hold up the others. When
    `max_queued` rounds wait, further ones are answered with error "capacity" at once; their closes still
    count, and their sessions have to be opened again. Background work (drafts for scoring, one a stream at
    most, then prompt prefill and drafts ahead) is done in small pieces while no round waits.
    """

    def __init__(
        self,
        pool: DrafterPool,
        max_queued: int = 256,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        turn_limit_s: float = TURN_LIMIT_S,
    ) -> None:
        if min(max_queued, max_batch_tokens) < 1:
            raise ValueError("limits must be positive")
        self._pool = pool
        self._max_queued = max_queued
        self._max_batch_tokens = max_batch_tokens
        self._turn_limit_s = turn_limit_s
        self._changed = threading.Condition()
        self._queue: FairQueue[Round] = FairQueue()
        self._ended: list[int] = []
        self._closing: list[int] = []
        self._streams: set[int] = set()
        self._next_stream = 0
        self._stopped = False
        # Owned by the drafting thread from here on.
        self._open: dict[int, set[int]] = {}
        self._rounds = 0
        self._drafted = 0
        self._busy_s = 0.0
        self._shadows: dict[int, tuple[Round, SessionUpdate]] = {}
        self._thread = threading.Thread(target=self._run, name="s2d-drafting", daemon=True)
        self._watch = TurnWatch(self._thread)

    @property
    def pool(self) -> DrafterPool:
        """For its names and limits; everything else belongs to the drafting thread."""
        return self._pool

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the thread; rounds that still wait are answered with empty drafts."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def attach(self, weight: float = 1.0) -> int:
        """A new stream's id; shifted by `SCOPE_SHIFT` it is the scope of the stream's sessions. `weight`: its
        share of the drafting, relative to others, while more is asked for than can be done."""
        with self._changed:
            self._next_stream += 1
            self._streams.add(self._next_stream)
            self._queue.attach(self._next_stream, weight)
            return self._next_stream

    def detach(self, stream_id: int) -> None:
        """The stream has ended: forget its sessions and what it has waiting."""
        with self._changed:
            self._streams.discard(stream_id)
            self._queue.detach(stream_id)
            self._ended.append(stream_id)
            self._changed.notify()

    def submit(self, round_: Round) -> None:
        with self._changed:
            accepted = len(self._queue) < self._max_queued and not self._stopped
            if accepted:
                self._queue.put(round_.stream_id, sum(u.budget for u in round_.updates), round_)
            else:
                self._closing.extend(round_.closes)
            self._changed.notify()
        if not accepted:
            message = f"{self._max_queued} rounds wait already"
            round_.reply([_failed(u, DrafterError("capacity", message)) for u in round_.updates])

    def state(self) -> BatcherState:
        used, free = self._pool.kv_blocks
        return BatcherState(
            sessions=self._pool.num_sessions,
            streams=len(self._streams),
            queued_rounds=len(self._queue),
            kv_blocks_used=used,
            kv_blocks_free=free,
            rounds=self._rounds,
            drafted_tokens=self._drafted,
            busy_s=self._busy_s,
            ahead=self._pool.ahead_counts,
            healthy=self._watch.healthy(self._turn_limit_s),
            failing=self._pool.failing,
        )

    def _run(self) -> None:
        idle = False
        while True:
            with self._changed:
                if idle and not (self._queue or self._ended or self._closing or self._stopped):
                    self._watch.rests()
                    self._changed.wait(_IDLE_S)
                self._watch.begins()
                stopped = self._stopped
                rounds = self._queue.take(sys.maxsize if stopped else self._max_batch_tokens)
                ended, self._ended = self._ended, []
                closing, self._closing = self._closing, []
            for sid in closing:
                self._close(sid)
            if rounds:
                started = time.monotonic()
                self._serve(rounds)
                self._busy_s += time.monotonic() - started
            for stream_id in ended:
                self._shadows.pop(stream_id, None)
                for sid in self._open.pop(stream_id, ()):
                    self._pool.close(sid)
            if stopped:
                return
            idle = not rounds and not self._shadow() and not self._pool.work()

    def _shadow(self) -> bool:
        """One draft for scoring, if somebody wants one."""
        if not self._shadows:
            return False
        round_, update = self._shadows.pop(next(iter(self._shadows)))
        started = time.monotonic()
        try:
            draft = self._pool.shadow(update) or SessionDraft(update.session_id, update.epoch)
        except Exception as error:
            logger.exception("a draft for scoring failed")
            draft = _failed(update, _internal(error))
        self._busy_s += time.monotonic() - started
        if round_.shadow_reply is not None:
            _send(round_.shadow_reply, [draft])
        return True

    def _serve(self, rounds: list[Round]) -> None:
        waiting = [_Answers(r) for r in rounds]
        try:
            self._collect_wishes(waiting)
            # Whose draft is prepared does not wait for those that have to be computed.
            ready = [a for a in waiting if all(self._pool.prepared(u) for u in a.asked.values())]
            if ready:
                self._propose(ready)
                waiting = [a for a in waiting if a not in ready]
                self._reply(ready)
            self._propose(waiting)
            self._watch.ended(failed=False)
        except Exception as error:
            logger.exception("a batch of %d rounds failed", len(waiting))
            self._watch.ended(failed=True)
            failure = _internal(error)
            for answer in waiting:
                for place, update in enumerate(answer.round.updates):
                    answer.drafts.setdefault(place, _failed(update, failure))
        self._reply(waiting)

    def _collect_wishes(self, answers: Sequence[_Answers]) -> None:
        """Tell the pool everything in order; what is left to draft is the last wish of each session."""
        last: dict[int, _Answers] = {}
        for answer in answers:
            for place, update in self._tell(answer):
                superseded = last.get(update.session_id)
                if superseded is not None:
                    superseded.give_up(update.session_id)
                answer.asked[place] = update
                last[update.session_id] = answer
        now = time.monotonic()
        for answer in answers:
            if answer.round.deadline < now:
                for update in list(answer.asked.values()):
                    answer.give_up(update.session_id)

    def _propose(self, answers: Sequence[_Answers]) -> None:
        asked = [(answer, place, update) for answer in answers for place, update in answer.asked.items()]
        drafts = self._pool.propose([update for _, _, update in asked])
        for (answer, place, _), draft in zip(asked, drafts, strict=True):
            answer.drafts[place] = draft
            self._drafted += len(draft.token_ids)
        self._rounds += len(answers)

    @staticmethod
    def _reply(answers: Sequence[_Answers]) -> None:
        for answer in answers:
            _send(answer.round.reply, [answer.drafts[place] for place in sorted(answer.drafts)])

    def _tell(self, answer: _Answers) -> Iterator[tuple[int, SessionUpdate]]:
        """Apply one round; yields (place, update) of what wants a draft."""
        round_ = answer.round
        if round_.reset is not None:
            self._pool.reset(round_.reset)
        for sid in round_.closes:
            self._close(sid)
        refused: dict[int, DrafterError] = {}
        opened = self._open.setdefault(round_.stream_id, set())
        for session in round_.opens:
            try:
                self._pool.open(session)
                opened.add(session.session_id)
            except DrafterError as error:
                opened.discard(session.session_id)
                refused[session.session_id] = error
        for place, update in enumerate(round_.updates):
            try:
                if update.session_id in refused:
                    raise refused[update.session_id]
                self._pool.apply(update)
            except DrafterError as error:
                answer.drafts[place] = _failed(update, error)
                continue
            if update.nested is not None and update.nested.shadow_length > 0:
                self._shadows[round_.stream_id] = (round_, update)
            if update.budget > 0:
                yield place, update

    def _close(self, session_id: int) -> None:
        self._open.get(session_id >> SCOPE_SHIFT, set()).discard(session_id)
        self._pool.close(session_id)


def _send(reply: ReplyCallback, drafts: list[SessionDraft]) -> None:
    """What a drafter made is encoded in here: where that fails, the drafts to blame become errors of their
    sessions, and a reply that fails all the same concerns its round alone."""
    for checked in (False, True):
        try:
            reply([_encodable(draft) for draft in drafts] if checked else drafts)
            return
        except Exception:
            logger.exception("a reply with %d drafts failed", len(drafts))


def _encodable(draft: SessionDraft) -> SessionDraft:
    try:
        codec.draft_to_proto(draft)
    except Exception as error:
        return _failed(draft, _internal(error))
    return draft


def _internal(error: Exception) -> DrafterError:
    return DrafterError("internal", f"{type(error).__name__}: {error}")


def _failed(asked: SessionUpdate | SessionDraft, error: DrafterError) -> SessionDraft:
    return SessionDraft(asked.session_id, asked.epoch, error=error.code, error_message=error.message)
