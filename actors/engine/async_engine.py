"""The asyncio side of an engine: admission, output streams, calls with a timeout."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Literal

from actors.drafting.assignment import DraftAssignment
from actors.engine.interface import TargetEngine
from actors.engine.loop import Abort, Add, Assign, Call, EngineLoop, Event, Rejected, Reply, Stop
from actors.engine.messages import EngineRequest, EngineStats, RequestOutput, ResetScope
from actors.sampling.params import ParameterError

HEALTH_POLL_S = 2.0
"""How often a silent stream asks whether the engine still lives."""
_SHUTTING_DOWN = "the model is shutting down"
MIN_RETRY_AFTER_S, MAX_RETRY_AFTER_S = 1.0, 30.0


class Overloaded(Exception):
    """The queue is full. `retry_after_s` estimates when a place is free."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineUnavailable(Exception):
    """The engine is closing, closed, or dead."""


class OutputStream:
    """Outputs of the requests of one `submit`, in order of arrival. Closing it aborts what still runs."""

    def __init__(self, engine: AsyncEngine, request_ids: Sequence[str]) -> None:
        self._engine = engine
        self._open = set(request_ids)
        self._queue: asyncio.Queue[RequestOutput | Rejected] = asyncio.Queue()  # at most a message a token

    def put(self, event: RequestOutput | Rejected) -> None:
        self._queue.put_nowait(event)

    @property
    def open(self) -> bool:
        """Whether a request of this stream has not finished."""
        return bool(self._open)

    @property
    def ready(self) -> bool:
        """Whether `get` would return without waiting."""
        return not self._queue.empty()

    async def get(self, timeout_s: float | None = None) -> RequestOutput | None:
        """The next output; None when `timeout_s` pass without one, or nothing is open.

        Raises ParameterError when the engine rejects a request, EngineUnavailable when it is dead.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self._open:
            left = HEALTH_POLL_S if deadline is None else min(HEALTH_POLL_S, deadline - time.monotonic())
            try:
                if self._queue.empty() and left <= 0:
                    return None
                async with asyncio.timeout(max(left, 0.001)):
                    event = await self._queue.get()
            except TimeoutError:
                if not self._engine.healthy():
                    raise EngineUnavailable("the engine has stopped answering") from None
                continue
            if event.request_id not in self._open:
                continue  # aborted while its last output was under way
            if isinstance(event, Rejected):
                self._open.discard(event.request_id)
                raise ParameterError(event.param, event.message)
            if event.finished:
                self._open.discard(event.request_id)
            return event
        return None

    def abort(self, request_id: str) -> None:
        """End one request now; no output of it follows."""
        if request_id in self._open:
            self._open.discard(request_id)
            self._engine.abort(request_id)

    def close(self) -> None:
        """Abort everything that still runs."""
        for request_id in tuple(self._open):
            self.abort(request_id)


class AsyncEngine:
    """A `TargetEngine` for one event loop, the one that first uses it.

    At most `max_running + max_queued` requests are inside at a time; more raise `Overloaded`.
    """

    def __init__(
        self,
        engine: TargetEngine,
        *,
        max_running: int,
        max_queued: int,
        step_limit_s: float = 120.0,
        call_timeout_s: float = 10.0,
    ) -> None:
        self._capacity = max_running + max_queued
        self._step_limit_s = step_limit_s
        self._call_timeout_s = call_timeout_s
        self._thread = EngineLoop(engine, self._emit)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[str, OutputStream] = {}
        self._calls: dict[int, asyncio.Future[EngineStats | None]] = {}
        self._call_ids = itertools.count()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False
        self._last_finish = time.monotonic()
        self._finish_interval_s = 1.0

    @property
    def capacity(self) -> int:
        """Requests that can be inside at most."""
        return self._capacity

    @property
    def live(self) -> int:
        """Requests inside: running and waiting."""
        return len(self._streams)

    def healthy(self) -> bool:
        """Whether the engine thread lives (or has not been needed yet) and answers."""
        return self._loop is None or self._thread.healthy(self._step_limit_s)

    def submit(self, requests: Sequence[EngineRequest]) -> OutputStream:
        """Admit all of `requests` or none.

        Raises Overloaded, EngineUnavailable, ValueError for an id that is already inside, and
        ParameterError("n") for more than can ever be inside.
        """
        self._start()
        if self._closing or not self._thread.alive:
            raise EngineUnavailable(_SHUTTING_DOWN)
        if len(requests) > self._capacity:
            raise ParameterError("n", f"at most {self._capacity} choices fit this model's queue")
        if len(self._streams) + len(requests) > self._capacity:
            raise Overloaded(
                f"{len(self._streams)} requests are running or waiting; the limit is {self._capacity}",
                self._retry_after(len(requests)),
            )
        ids = [request.request_id for request in requests]
        if len(set(ids)) != len(ids) or any(i in self._streams for i in ids):
            raise ValueError("request ids must be unique")
        if not self._streams:
            self._last_finish = time.monotonic()  # idle time says nothing about how long a place is taken
        stream = OutputStream(self, ids)
        for request in requests:
            self._idle.clear()
            self._streams[request.request_id] = stream
            self._thread.send(Add(request))
        return stream

    async def generate(self, request: EngineRequest) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one request. Closing the iterator, or cancelling its consumer, aborts it at once."""
        stream = self.submit([request])
        try:
            while (output := await stream.get()) is not None:
                yield output
        finally:
            stream.close()

    def abort(self, request_id: str) -> None:
        """Forget a request and free what it holds; unknown ids are ignored."""
        if self._forget(request_id):
            self._thread.send(Abort(request_id))

    async def stats(self) -> EngineStats:
        """A fresh snapshot, taken between two steps. Raises TimeoutError or EngineUnavailable."""
        stats = await self._call("stats")
        if stats is None:
            raise EngineUnavailable("the engine gave no statistics")
        return stats

    async def reset(self, scope: ResetScope = "all") -> None:
        """Drop what requests share. Raises TimeoutError or EngineUnavailable."""
        await self._call("reset", scope)

    def assign(self, assignment: DraftAssignment) -> None:
        """Draft as assigned from the next round on. Raises EngineUnavailable."""
        self._start()
        if not self._thread.alive:
            raise EngineUnavailable("the engine has stopped")
        self._thread.send(Assign(assignment))

    async def drain(self, timeout_s: float) -> bool:
        """Admit nothing more and wait for what is inside. False when some had to be aborted."""
        self._closing = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            for request_id in tuple(self._streams):
                stream = self._streams[request_id]
                self.abort(request_id)
                stream.put(RequestOutput(request_id, finish_reason="abort", error=_SHUTTING_DOWN))
            return False
        return True

    async def close(self, timeout_s: float = 10.0) -> bool:
        """Stop the thread and close the engine. False when a step did not end in time."""
        self._start()
        self._closing = True
        self._thread.send(Stop())
        return await asyncio.to_thread(self._thread.join, timeout_s)

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            self._thread.start()
        elif self._loop is not loop:
            raise RuntimeError("an AsyncEngine belongs to one event loop")

    def _emit(self, events: list[Event]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Reply):
                self._answer(event)
            elif (stream := self._streams.get(event.request_id)) is not None:
                stream.put(event)
                if isinstance(event, Rejected) or event.finished:
                    self._forget(event.request_id)

    def _answer(self, reply: Reply) -> None:
        future = self._calls.pop(reply.call_id, None)
        if future is None or future.done():
            return  # timed out
        if reply.error is not None:
            future.set_exception(EngineUnavailable(reply.error))
        else:
            future.set_result(reply.stats)

    async def _call(self, what: Literal["stats", "reset"], scope: ResetScope = "all") -> EngineStats | None:
        self._start()
        if not self._thread.alive:
            raise EngineUnavailable("the engine has stopped")
        call_id = next(self._call_ids)
        future: asyncio.Future[EngineStats | None] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        self._thread.send(Call(call_id, what, scope))
        try:
            async with asyncio.timeout(self._call_timeout_s):
                return await future
        finally:
            self._calls.pop(call_id, None)

    def _forget(self, request_id: str) -> bool:
        if self._streams.pop(request_id, None) is None:
            return False
        now = time.monotonic()
        self._finish_interval_s += 0.2 * (now - self._last_finish - self._finish_interval_s)
        self._last_finish = now
        if not self._streams:
            self._idle.set()
        return True

    def _retry_after(self, places: int) -> float:
        """Seconds until `places` are free, from the mean time between two ends."""
        return min(max(places * self._finish_interval_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)
