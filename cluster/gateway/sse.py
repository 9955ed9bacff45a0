"""JSON and server-sent events as they go over the wire."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


def to_jsonable(value: object) -> Any:
    """Dataclasses, tuples and mappings as JSON values; numbers that JSON does not have become null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_jsonable(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_jsonable(v) for v in value]
    if isinstance(value, bool) or value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def encode(value: object) -> bytes:
    """Compact JSON. Escapes everything outside ASCII, so any string can be sent."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def event(value: object) -> bytes:
    return b"data: " + encode(value) + b"\n\n"


class JsonResponse(Response):
    media_type = "application/json"

    def __init__(self, content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(encode(content), status, dict(headers or {}))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first(main: asyncio.Task[T], watcher: asyncio.Task[None]) -> bool:
    """Wait for either; True when `main` ended. Both are cancelled and awaited if the caller is."""
    try:
        await asyncio.wait({main, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return main.done()
    finally:
        for task in (main, watcher):
            if not task.done():
                task.cancel()
        await asyncio.gather(main, watcher, return_exceptions=True)


class EventStreamResponse(Response):
    """Server-sent events. `on_close` is awaited whatever happens: at the end, when the client goes away, and
    when the server cancels the request. Ray Serve does the last on a disconnect, at a moment when the
    generator may be suspended in a `yield`, where cancellation alone does not reach it."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], on_close: Callable[[], Awaitable[None]]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def produce() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        main = asyncio.create_task(produce())
        watcher = asyncio.create_task(_disconnected(receive))
        try:
            if await _first(main, watcher):
                await main
        finally:
            await self._on_close()
            await self._events.aclose()


class ClientGoneError(Exception):
    """The client closed the connection before the answer was complete."""


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, cancelling it when the client goes away (raises `ClientGoneError`). The request's body
    must have been read."""
    main = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(request.receive))
    if not await _first(main, watcher):
        raise ClientGoneError
    return main.result()
