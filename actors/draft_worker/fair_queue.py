"""Whose rounds a draft worker serves next: start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996),
counted in draft tokens."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items of several streams. A stream that always has something waiting is served a share of the tokens in
    proportion to its weight, whatever the others ask for; one that was idle saves nothing up. Items of one
    stream stay in order."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, int, T]] = []
        self._order = count()
        self._weights: dict[int, float] = {}
        self._finish: dict[int, float] = {}
        """Virtual time at which what a stream has put in so far is served."""
        self._now = 0.0

    def __len__(self) -> int:
        return len(self._heap)

    def attach(self, stream_id: int, weight: float) -> None:
        """`weight` > 0."""
        self._weights[stream_id] = weight

    def detach(self, stream_id: int) -> None:
        """Forget a stream and what it has waiting."""
        self._weights.pop(stream_id, None)
        self._finish.pop(stream_id, None)
        self._heap = [entry for entry in self._heap if entry[2] != stream_id]
        heapify(self._heap)

    def put(self, stream_id: int, tokens: int, item: T) -> None:
        """`tokens`: what serving it takes, at least 0."""
        start = max(self._now, self._finish.get(stream_id, 0.0))
        self._finish[stream_id] = start + tokens / self._weights.get(stream_id, 1.0)
        heappush(self._heap, (start, next(self._order), stream_id, tokens, item))

    def take(self, tokens: int) -> list[T]:
        """The next items, of `tokens` tokens together at most, or one that has more."""
        taken: list[T] = []
        left = tokens
        while self._heap and (not taken or self._heap[0][3] <= left):
            start, _, _, cost, item = heappop(self._heap)
            self._now = max(self._now, start)
            left -= cost
            taken.append(item)
        return taken
