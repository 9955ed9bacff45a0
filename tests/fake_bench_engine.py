"""An engine for tests of the benchmark: known latencies, known answers, and a log of what was asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.bench.engines.interface import BenchRequest, BenchResponse, SpeculationCounts


@dataclass
class FakeEngine:
    """Tokens come in chunks of `chunk`, the first after `ttft_s`, then one chunk each `gap_s`. `parallel`
    requests run at once. `answer` stands for what it says; `fail` names requests that go wrong."""

    name: str
    ttft_s: float = 0.0
    gap_s: float = 0.0
    chunk: int = 1
    parallel: int = 1000
    answer: str = "answer"
    tokens: int | None = None
    accepted: int | None = None
    fail: str | None = None
    pid: int | None = None
    start_error: Exception | None = None
    log: list[tuple[str, str]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    cancelled: int = 0

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.parallel)

    async def start(self) -> None:
        self.log.append(("start", ""))
        if self.start_error is not None:
            raise self.start_error

    async def stop(self) -> None:
        self.log.append(("stop", ""))

    async def reset(self) -> None:
        self.log.append(("reset", ""))

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "fake"}

    async def generate(self, request: BenchRequest) -> BenchResponse:
        self.log.append(("generate", request.request_id))
        response = BenchResponse(request.request_id, time.perf_counter())
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            async with self._slots:
                await self._answer(request, response)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return response

    async def _answer(self, request: BenchRequest, response: BenchResponse) -> None:
        if self.fail is not None and self.fail in request.request_id:
            response.error = "told to fail"
            return
        left = request.max_tokens if self.tokens is None else self.tokens
        total = left
        await asyncio.sleep(self.ttft_s)
        while left > 0:
            count = min(self.chunk, left)
            response.arrivals.append((time.perf_counter(), count))
            left -= count
            if left:
                await asyncio.sleep(self.gap_s)
        response.text = self.answer
        response.token_ids = tuple(self.answer.encode())
        response.finish_reason = "length"
        if self.accepted is not None:
            response.speculation = SpeculationCounts(
                total - self.accepted, 2 * self.accepted, self.accepted, (self.accepted,), {"toy": (4, 2)}
            )
