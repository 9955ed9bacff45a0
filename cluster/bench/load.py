"""Serving load: closed loop (so many requests in flight) and open loop (Poisson arrivals).

A block is one engine at one point (a concurrency or a rate) with a fixed list of requests. A pair is one
block of every engine with the same requests and arrival times, in an order that rotates from pair to pair,
so that slow minutes of the machine hit all engines alike. Nothing is measured before a warm-up at the same
point.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.bench.config import LoadSettings
from cluster.bench.datasets import Question
from cluster.bench.engines.interface import BenchEngine, BenchRequest, BenchResponse
from cluster.bench.records import Record
from cluster.bench.rendering import PromptRenderer
from cluster.bench.running import ask, reset, rotated, warm_up
from cluster.bench.turns import Turns


@dataclass(frozen=True, slots=True)
class Point:
    """Exactly one is set."""

    concurrency: int | None = None
    rate: float | None = None

    @property
    def label(self) -> str:
        return f"concurrency {self.concurrency}" if self.rate is None else f"{self.rate:g} requests/s"


@dataclass(frozen=True, slots=True)
class Block:
    """duration_s: from the first request sent to the last token (or failure) of any."""

    engine: str
    pair: int
    point: Point
    duration_s: float
    records: tuple[Record, ...]


def points(settings: LoadSettings) -> list[Point]:
    return [Point(concurrency=c) for c in settings.concurrency] + [Point(rate=r) for r in settings.rate]


def block_size(point: Point, settings: LoadSettings) -> int:
    """Requests of a block."""
    if point.concurrency is not None:
        return point.concurrency * settings.requests_per_stream
    return settings.requests_per_rate


def arrival_times(rate: float, count: int, seed: Sequence[int]) -> list[float]:
    """Seconds after the start of a block at which requests arrive, a Poisson process; the first at 0."""
    gaps = np.random.default_rng(list(seed)).exponential(1.0 / rate, count - 1)
    return [0.0, *np.cumsum(gaps).tolist()]


async def closed_loop(
    engine: BenchEngine, requests: Sequence[BenchRequest], concurrency: int, timeout_s: float
) -> list[BenchResponse]:
    """Responses in the order of `requests`: each stream sends its next request when the last one ended."""
    responses: dict[int, BenchResponse] = {}
    waiting = iter(enumerate(requests))

    async def stream() -> None:
        for index, request in waiting:
            responses[index] = await ask(engine, request, timeout_s)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(requests))):
            group.create_task(stream())
    return [responses[i] for i in range(len(requests))]


async def open_loop(
    engine: BenchEngine, requests: Sequence[BenchRequest], arrivals: Sequence[float], timeout_s: float
) -> list[BenchResponse]:
    """Responses in the order of `requests`, each sent at its time whatever has become of the others."""
    began = time.perf_counter()

    async def send(request: BenchRequest, at: float) -> BenchResponse:
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        return await ask(engine, request, timeout_s)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(send(r, at)) for r, at in zip(requests, arrivals, strict=True)]
    return [task.result() for task in tasks]


async def run_load(
    engines: Sequence[BenchEngine],
    questions: Sequence[Question],
    renderer: PromptRenderer,
    settings: LoadSettings,
    advance: Callable[[Block], None] = lambda block: None,
    keep: list[Block] | None = None,
    turns: Turns | None = None,
) -> list[Block]:
    """Blocks are appended to `keep` as they end, so that an interrupted run keeps what it has. Raises
    BenchError when an engine cannot be warmed up or reset."""
    blocks = [] if keep is None else keep
    turns = turns or Turns()
    place = 0
    for point_index, point in enumerate(points(settings)):
        size = block_size(point, settings)
        for engine in engines:
            # At the same batch size, once: costs that an engine measures or compiles lazily are then known.
            at_once = load_requests(
                [questions[i % len(questions)] for i in range(size)], renderer, settings, 0
            )
            await turns.give_to(engine)
            await warm_up(engine, at_once[: point.concurrency or size], settings.request_timeout_s)
        for pair in range(settings.pairs):
            asked = [questions[(place + i) % len(questions)] for i in range(size)]
            place += size
            requests = load_requests(asked, renderer, settings, pair)
            for order, engine in enumerate(rotated(engines, pair)):
                await turns.give_to(engine)
                await reset(engine)
                began = time.perf_counter()
                if point.concurrency is not None:
                    responses = await closed_loop(
                        engine, requests, point.concurrency, settings.request_timeout_s
                    )
                else:
                    arrivals = arrival_times(point.rate or 1.0, size, (settings.seed, point_index, pair))
                    responses = await open_loop(engine, requests, arrivals, settings.request_timeout_s)
                block = _block(engine.name, pair, order, point, asked, requests, responses, began)
                blocks.append(block)
                advance(block)
    return blocks


def load_requests(
    questions: Sequence[Question], renderer: PromptRenderer, settings: LoadSettings, pair: int
) -> list[BenchRequest]:
    """First turns, with seeds and ids that differ."""
    return [_request(question, renderer, settings, i, pair) for i, question in enumerate(questions)]


def _request(
    question: Question, renderer: PromptRenderer, settings: LoadSettings, index: int, pair: int
) -> BenchRequest:
    prompt = renderer.render(question.turns[:1])
    return BenchRequest(
        f"{question.question_id}/{pair}/{index}",
        prompt.ids,
        prompt.text,
        settings.max_tokens,
        settings.ignore_eos,
        settings.temperature,
        settings.seed + index,
    )


def _block(
    engine: str,
    pair: int,
    order: int,
    point: Point,
    asked: Sequence[Question],
    requests: Sequence[BenchRequest],
    responses: Sequence[BenchResponse],
    began: float,
) -> Block:
    failed = any(r.error is not None for r in responses)
    # A failed request has no last token; what it took counts all the same.
    ended = time.perf_counter() if failed else max(r.finished for r in responses)
    records = tuple(
        Record(
            engine,
            pair,
            order,
            question.question_id,
            question.task,
            len(request.prompt_ids),
            response,
            concurrency=point.concurrency,
            rate=point.rate,
        )
        for question, request, response in zip(asked, requests, responses, strict=True)
    )
    return Block(engine, pair, point, ended - began, records)
