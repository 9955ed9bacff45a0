"""The engine thread: owns a `TargetEngine`, fed through one queue, heard through one callback.

Everything that crosses is a plain message, so that the thread can become a process. The thread sleeps on its
queue when the engine has no work, and handles what has arrived between two steps.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from actors.drafting.assignment import DraftAssignment
from actors.engine.interface import TargetEngine
from actors.engine.messages import EngineRequest, EngineStats, RequestOutput, ResetScope
from actors.sampling.params import ParameterError
from actors.turn_watch import TurnWatch

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 5.0
"""Longest sleep on an empty queue; waking up finds nothing to do and sleeps again."""
IDLE_WORK_EVERY_S = 0.5
"""The same while the engine has work for idle moments."""


@dataclass(frozen=True, slots=True)
class Add:
    request: EngineRequest


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class Call:
    """Ask for something that is answered by a `Reply` with the same id."""

    call_id: int
    what: Literal["stats", "reset"]
    scope: ResetScope = "all"


@dataclass(frozen=True, slots=True)
class Assign:
    """Draft as assigned from now on."""

    assignment: DraftAssignment


@dataclass(frozen=True, slots=True)
class Stop:
    pass


Message = Add | Abort | Call | Assign | Stop


@dataclass(frozen=True, slots=True)
class Rejected:
    """The engine can never serve this request; `param` and `message` are those of the `ParameterError`."""

    request_id: str
    param: str
    message: str


@dataclass(frozen=True, slots=True)
class Reply:
    call_id: int
    stats: EngineStats | None = None
    error: str | None = None


Event = RequestOutput | Rejected | Reply


@dataclass(slots=True)
class _Delivery:
    """Of one live request: how long its outputs may wait, and when the next must leave (monotonic)."""

    interval_s: float
    due: float = 0.0


class EngineLoop:
    """Runs `engine` in a thread of its own and closes it at the end.

    `emit` gets events in one call, in the engine thread; it must not block, and a RuntimeError from it means
    that nobody listens any more and ends the thread. Outputs of several steps come together where requests
    allow it (`delivery_interval_s`): whoever listens wakes up on a core that the next step computes on. A
    step that raises is fatal for the requests in the engine (each gets an error output), not for the loop.
    """

    def __init__(self, engine: TargetEngine, emit: Callable[[list[Event]], None]) -> None:
        self._engine = engine
        self._emit = emit
        self._inbox: queue.Queue[Message] = queue.Queue()  # bounded by the admission of requests
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._watch = TurnWatch(self._thread)
        self._live: dict[str, _Delivery] = {}
        self._events: list[Event] = []
        self._urgent = False
        self._has_work = False
        self._idle_work = True
        self._idle_s = 0.0

    def start(self) -> None:
        self._thread.start()

    def send(self, message: Message) -> None:
        """Queue a message; from any thread, never blocks."""
        self._inbox.put(message)

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end, after `Stop`. False when it has not ended in time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def healthy(self, step_limit_s: float) -> bool:
        """False when the thread has ended, one turn takes longer than the limit, or steps keep failing."""
        return self._watch.healthy(step_limit_s)

    def _run(self) -> None:
        try:
            while self._receive():
                self._step()
                if self._urgent or not self._has_work:
                    self._flush()
        except Exception:
            logger.exception("the engine thread ends: it cannot recover")
            self._fail_live("the engine stopped")
        finally:
            self._watch.rests()
            try:
                self._flush()
            except RuntimeError:
                logger.info("nobody listens to the engine any more")
            self._engine.close()

    def _receive(self) -> bool:
        """Handle all waiting messages; sleep for the first when there is no work. False after `Stop`."""
        try:
            message = self._next()
            while True:
                self._watch.begins()
                if isinstance(message, Stop):
                    self._fail_live("the engine was closed", "abort")
                    return False
                self._handle(message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            return True

    def _next(self) -> Message:
        """The next message; raises `queue.Empty` when there is none (at once while there is work)."""
        if self._has_work:
            return self._inbox.get_nowait()
        started = time.perf_counter()
        try:
            return self._inbox.get(timeout=IDLE_WORK_EVERY_S if self._idle_work else IDLE_WAIT_S)
        except queue.Empty:
            self._idle_work = self._idle_work and self._engine.idle(lambda: not self._inbox.empty())
            raise
        finally:
            self._idle_s += time.perf_counter() - started

    def _handle(self, message: Add | Abort | Call | Assign) -> None:
        if isinstance(message, Add):
            self._add(message.request)
        elif isinstance(message, Abort):
            self._live.pop(message.request_id, None)
            self._engine.abort(message.request_id)
            self._has_work = True  # asked anew in the next step
        elif isinstance(message, Assign):
            self._engine.assign(message.assignment)
        else:
            self._call(message)

    def _add(self, request: EngineRequest) -> None:
        try:
            self._engine.add(request)
        except ParameterError as error:
            self._announce(Rejected(request.request_id, error.param, error.message))
        except Exception as error:
            logger.exception("request %s could not be added", request.request_id)
            self._announce(_failed(request.request_id, f"{type(error).__name__}: {error}"))
        else:
            self._live[request.request_id] = _Delivery(request.delivery_interval_s)
            self._has_work = True

    def _call(self, call: Call) -> None:
        try:
            if call.what == "reset":
                self._engine.reset_shared_state(call.scope)
                reply = Reply(call.call_id)
            else:
                stats = replace(self._engine.stats(), idle_s=self._idle_s, clock_s=time.perf_counter())
                reply = Reply(call.call_id, stats=stats)
        except Exception as error:
            logger.exception("engine call %s failed", call.what)
            reply = Reply(call.call_id, error=f"{type(error).__name__}: {error}")
        self._announce(reply)

    def _step(self) -> None:
        """One engine step, if there is work."""
        try:
            if self._has_work and self._engine.has_work():
                self._watch.begins()
                for output in self._engine.step():
                    self._take(output)
                self._watch.ended(failed=False)
            self._has_work = self._engine.has_work()
        except Exception as error:
            logger.exception("an engine step failed; its %d requests end with an error", len(self._live))
            self._watch.ended(failed=True)
            for request_id in self._live:
                self._engine.abort(request_id)
            self._fail_live(f"{type(error).__name__}: {error}")
            self._has_work = self._engine.has_work()
        if not self._has_work:
            self._watch.rests()

    def _take(self, output: RequestOutput) -> None:
        """Queue an output, and note whether what is queued must leave now."""
        self._events.append(output)
        delivery = self._live.get(output.request_id)
        if output.finished or delivery is None:
            self._live.pop(output.request_id, None)
            self._urgent = True
        elif time.monotonic() >= delivery.due:
            self._urgent = True

    def _announce(self, event: Event) -> None:
        self._events.append(event)
        self._urgent = True

    def _fail_live(self, why: str, reason: Literal["error", "abort"] = "error") -> None:
        for request_id in sorted(self._live):
            self._announce(_failed(request_id, why, reason))
        self._live.clear()

    def _flush(self) -> None:
        self._urgent = False
        if not self._events:
            return
        events, self._events = self._events, []
        now = time.monotonic()
        for event in events:
            if isinstance(event, RequestOutput) and (delivery := self._live.get(event.request_id)):
                delivery.due = now + delivery.interval_s
        self._emit(events)


def _failed(request_id: str, why: str, reason: Literal["error", "abort"] = "error") -> RequestOutput:
    return RequestOutput(request_id, finish_reason=reason, error=why)
