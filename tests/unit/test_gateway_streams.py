"""Several streams as one: so many open at once, and one end for all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from cluster.gateway.streams import merged


@dataclass
class Streams:
    """Stream i yields i three times. Those of `held` wait after their first item, `failing` raises there."""

    held: frozenset[int] = frozenset()
    failing: int | None = None
    begun: list[int] = field(default_factory=list)
    open: set[int] = field(default_factory=set)
    most: int = 0

    async def one(self, index: int) -> AsyncIterator[int]:
        self.begun.append(index)
        self.open.add(index)
        self.most = max(self.most, len(self.open))
        try:
            for turn in range(3):
                await asyncio.sleep(0)
                if turn and index in self.held:
                    await asyncio.Event().wait()
                if turn and index == self.failing:
                    raise RuntimeError("lost")
                yield index
        finally:
            self.open.discard(index)

    def all(self, count: int) -> list[AsyncIterator[int]]:
        return [self.one(index) for index in range(count)]


async def test_the_next_begins_when_one_ends() -> None:
    streams = Streams()
    got = [item async for item in merged(streams.all(7), 4, 3)]
    assert sorted(got) == [(index, index) for index in range(7) for _ in range(3)]
    assert (streams.begun, streams.most, streams.open) == ([*range(7)], 3, set())


async def test_one_that_lasts_holds_up_no_other() -> None:
    streams = Streams(held=frozenset({0}))
    merger = merged(streams.all(6), 4, 2)
    async with asyncio.timeout(5.0):
        got = [await anext(merger) for _ in range(16)]
    assert {index for index, _ in got} == set(range(6))
    await merger.aclose()
    assert (streams.most, streams.open) == (2, set())


async def test_closing_ends_what_runs_and_begins_nothing_more() -> None:
    streams = Streams(held=frozenset({0, 1}))
    merger = merged(streams.all(5), 4, 2)
    await anext(merger)
    assert streams.open == {0, 1}
    await merger.aclose()
    assert (streams.open, streams.begun) == (set(), [0, 1])


async def test_one_that_fails_ends_the_others() -> None:
    streams = Streams(held=frozenset({0}), failing=1)
    got = []

    async def read() -> None:
        async for item in merged(streams.all(5), 4, 2):
            got.append(item)
            await asyncio.sleep(0.01)  # a slow reader must not give the others time to begin

    with pytest.raises(RuntimeError, match="lost"):
        await read()
    assert sorted(got) == [(0, 0), (1, 1)]
    assert (streams.open, streams.begun) == (set(), [0, 1])


async def test_a_stream_that_is_cancelled_from_within_ends_all() -> None:
    async def cancelled() -> AsyncIterator[int]:
        yield 1
        raise asyncio.CancelledError

    streams = Streams(held=frozenset({0}))

    async def read() -> None:
        async with asyncio.timeout(5.0):
            async for _ in merged([streams.one(0), cancelled()], 4, 2):
                pass

    with pytest.raises(RuntimeError, match="cancelled"):
        await read()
    assert streams.open == set()
