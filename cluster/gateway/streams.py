"""Several streams of chunks as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TypeVar

T = TypeVar("T")


async def merged(
    streams: Sequence[AsyncIterator[T]], size: int, at_once: int
) -> AsyncGenerator[tuple[int, T], None]:
    """(index of its stream, item) as they come, `size` of them read ahead at most. `at_once` streams are open
    at most: the next begins when one ends.

    The first exception of a stream ends all and is raised, after what came before it. Closing the generator
    closes every stream.
    """
    queue: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(size)
    turns = asyncio.Semaphore(at_once)

    async def pump(index: int, stream: AsyncIterator[T]) -> None:
        try:
            await turns.acquire()
            async for item in stream:
                await queue.put((index, item))
            turns.release()  # one that fails keeps its turn: nothing more begins
            await queue.put(None)
        except Exception as error:
            await queue.put(error)
        except asyncio.CancelledError as error:
            own = asyncio.current_task()
            if own is None or own.cancelling():
                raise
            # A stream's own, say of a worker's call: without an entry the reader would wait for ever.
            await queue.put(RuntimeError(f"a stream was cancelled: {error}"))
        finally:
            await aclose(stream)

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        running = len(pumps)
        while running:
            entry = await queue.get()
            if entry is None:
                running -= 1
            elif isinstance(entry, Exception):
                raise entry
            else:
                yield entry
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def aclose(stream: AsyncIterator[T]) -> None:
    """Close a stream if it can be closed (async generators can)."""
    close = getattr(stream, "aclose", None)
    if close is not None:
        await close()
