"""`s2d bench soak`: a server of its own, thousands of mixed requests, memory read all the while."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from cluster.bench.config import SoakSettings
from cluster.bench.engines.s2d_server import S2DServer
from cluster.bench.environment import environment
from cluster.bench.profile import require_psutil
from cluster.bench.prompts import PROMPTS
from cluster.bench.report import document_of, publish
from cluster.bench.running import START_TIMEOUT_S, BenchError
from cluster.bench.session import own_server_config, progress_bar, saving
from cluster.bench.soak.memory import Growth, MemorySample, growth, read_memory, worst_total
from cluster.bench.soak.report import SoakResults, plot_soak, soak_tables
from cluster.bench.soak.traffic import SoakRequest, count_kinds, requests, send
from cluster.gateway.sse import to_jsonable
from cluster.reporting.table import Table

MAX_FAILED_SHARE = 0.2
"""A server that fails more than this is not soaked any longer."""


async def measure_soak(settings: SoakSettings, out: Path) -> bool:
    """soak.json, soak.md and soak.png in `out`. Returns whether memory stayed flat and no request failed.
    Raises one of `EXPECTED_ERRORS`."""
    require_psutil()
    console = Console(stderr=True)
    config = own_server_config(
        settings.source, settings.dtype, settings.server_config,
        kv_blocks=settings.kv_blocks, threads=settings.threads,
    )  # fmt: skip
    machine = await asyncio.to_thread(environment)
    results = SoakResults(settings.requests)
    grown: list[Growth] = []

    def write(interrupted: str | None) -> list[Table]:
        document = document_of("soak", settings, machine, {}, interrupted) | {
            "growth": [{**to_jsonable(g), "percent": g.percent} for g in grown],
            "results": to_jsonable(results),
        }
        tables = soak_tables(results, grown, settings.limit)
        publish(out, "soak", "Memory under mixed requests", document, tables, lambda p: plot_soak(results, p))
        return tables

    console.print("starting the server")
    async with _running(S2DServer(config)) as server:
        with saving(console, out, write, lambda: bool(results.samples)), progress_bar(console) as bar:
            task = bar.add_task("requests", total=settings.requests)
            await soak(server, settings, results, lambda: bar.advance(task))
            grown += growth(results.samples, settings.requests)
    total = worst_total(grown)
    flat = total.percent <= settings.limit
    console.print(
        f"{total.measure.upper()} of all processes grew by {total.percent:+.2f} %: "
        + ("flat" if flat else f"more than {settings.limit:g} %")
    )
    if results.failures:
        console.print(f"{len(results.failures)} requests failed")
    return flat and not results.failures


@asynccontextmanager
async def _running(server: S2DServer) -> AsyncIterator[S2DServer]:
    async with asyncio.timeout(START_TIMEOUT_S):
        await server.acquire()
    try:
        yield server
    finally:
        await server.release()


async def soak(
    server: S2DServer, settings: SoakSettings, results: SoakResults, advance: Callable[[], None]
) -> None:
    """Closed loop: each of the streams sends its next request when its last one ended. Raises BenchError when
    too many requests fail, and when memory can no longer be read."""
    todo = requests(server.model, [p.text for p in PROMPTS], settings.requests, settings.seed)
    results.kinds = count_kinds(todo)
    limits = httpx.Limits(max_connections=settings.concurrency)
    began = time.monotonic()
    async with httpx.AsyncClient(
        base_url=server.url, timeout=settings.request_timeout_s, headers=server.headers, limits=limits,
        trust_env=False,
    ) as client:  # fmt: skip
        reader = asyncio.create_task(_read_forever(server, settings, results, began))
        streams = asyncio.create_task(_streams(client, todo, settings, results, advance))
        try:
            ended, _ = await asyncio.wait((streams, reader), return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()  # of the reader: why it ended
            results.duration_s = time.monotonic() - began
        finally:
            streams.cancel()
            reader.cancel()
            await asyncio.gather(streams, reader, return_exceptions=True)
    results.samples.append(await _reading(server, results, began))


async def _streams(
    client: httpx.AsyncClient,
    todo: Sequence[SoakRequest],
    settings: SoakSettings,
    results: SoakResults,
    advance: Callable[[], None],
) -> None:
    waiting: Iterator[SoakRequest] = iter(todo)

    async def stream() -> None:
        for request in waiting:
            try:
                async with asyncio.timeout(settings.request_timeout_s):
                    problem = await send(client, request)
            except TimeoutError:
                problem = f"took longer than {settings.request_timeout_s:g} s"
            results.ended += 1
            advance()
            if problem is not None:
                results.failures.append(f"{request.kind}: {problem}")
                if len(results.failures) > MAX_FAILED_SHARE * settings.requests:
                    raise BenchError(f"too many failed requests; the last one: {problem}")

    tasks = [asyncio.create_task(stream()) for _ in range(settings.concurrency)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read_forever(
    server: S2DServer, settings: SoakSettings, results: SoakResults, began: float
) -> None:
    while True:
        results.samples.append(await _reading(server, results, began))
        if results.untouched_kv_blocks is None and results.ended >= settings.requests / 10:
            with contextlib.suppress(httpx.HTTPError):
                results.untouched_kv_blocks = untouched_blocks(await server.state())
        await asyncio.sleep(settings.sample_s)


async def _reading(server: S2DServer, results: SoakResults, began: float) -> MemorySample:
    memory = await asyncio.to_thread(read_memory, server.pid)
    return MemorySample(results.ended, time.monotonic() - began, memory)


def untouched_blocks(state: Mapping[str, Any]) -> int | None:
    """Of the first replica of the first model, at most: free blocks that carry nothing. None when it is not
    told."""
    try:
        engine = state["models"][0]["replicas"][0]["engine"]
        return int(engine["kv_blocks_free"] - engine["kv_blocks_cached"])
    except (KeyError, IndexError, TypeError):
        return None
