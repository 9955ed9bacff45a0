"""`s2d bench start`: start, first request, stop, several times."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from pathlib import Path

import httpx
from rich.console import Console

from cluster.bench.config import StartSettings
from cluster.bench.engines.s2d_server import S2DServer
from cluster.bench.environment import environment
from cluster.bench.prompts import PROMPTS
from cluster.bench.report import document_of, publish
from cluster.bench.running import START_TIMEOUT_S, BenchError
from cluster.bench.session import own_server_config, progress_bar, saving
from cluster.bench.start.phases import READY, Timeline, split_start
from cluster.bench.start.report import Start, plot_starts, start_tables
from cluster.config import ClusterConfig
from cluster.gateway.sse import to_jsonable
from cluster.reporting.table import Table

POLL_S = 0.05
"""How exactly a phase is seen to end."""
PHASES_TIMEOUT_S = 60.0
FIRST_TOKEN_TIMEOUT_S = 120.0


async def measure_start(settings: StartSettings, out: Path) -> None:
    """start.json, start.md and start.png in `out`. Raises one of `EXPECTED_ERRORS`."""
    console = Console(stderr=True)
    config = own_server_config(
        settings.source, settings.dtype, settings.server_config, threads=settings.threads
    )
    machine = await asyncio.to_thread(environment)
    starts: list[Start] = []

    def write(interrupted: str | None) -> list[Table]:
        document = document_of("start", settings, machine, {}, interrupted) | {
            "starts": [{**to_jsonable(s), "total_s": s.total_s} for s in starts]
        }
        tables = start_tables(starts)
        publish(out, "start", "Cold start by phase", document, tables, lambda path: plot_starts(starts, path))
        return tables

    with saving(console, out, write, lambda: bool(starts)), progress_bar(console) as bar:
        task = bar.add_task("starts", total=settings.repeats)
        for _ in range(settings.repeats):
            starts.append(await one_start(config))
            bar.advance(task)


async def one_start(config: ClusterConfig) -> Start:
    """The server is stopped again. Raises EngineUnavailableError, TimeoutError, or BenchError when the first
    request fails or the server does not tell its phases."""
    server = S2DServer(config, poll_s=POLL_S)
    timeline = Timeline()
    began, began_at = time.time(), time.monotonic()
    watcher = asyncio.create_task(_watch(server, timeline, began_at))
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            await server.acquire()
        ready = time.monotonic() - began_at
        try:
            first_token = await _first_token(server) - began_at
            # `s2d serve` says that it is ready a moment after clients can see it.
            async with asyncio.timeout(PHASES_TIMEOUT_S):
                await watcher
            state = await server.state()
        finally:
            await server.release()
    except httpx.HTTPError as error:
        raise BenchError(f"the first request failed: {error or type(error).__name__}") from error
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher
    target = state["models"][0]["replicas"][0].get("startup", {})
    try:
        return Start(split_start(timeline, target, began, ready, first_token), dict(timeline.took))
    except ValueError as error:
        raise BenchError(str(error)) from error


async def _watch(server: S2DServer, timeline: Timeline, began_at: float) -> None:
    """Until it has printed its last phase."""
    while READY not in timeline.ended:
        timeline.see(server.output, time.monotonic() - began_at)
        await asyncio.sleep(POLL_S)


async def _first_token(server: S2DServer) -> float:
    """When the first chunk with text arrived. Raises httpx.HTTPError, and BenchError without such a chunk."""
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": PROMPTS[0].text}],
        "max_tokens": 16,
        "temperature": 0.0,
        "stream": True,
    }
    async with (
        httpx.AsyncClient(
            base_url=server.url, timeout=FIRST_TOKEN_TIMEOUT_S, headers=server.headers, trust_env=False
        ) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as answer,
    ):
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            data = line.removeprefix("data:").strip()
            if not data or data == "[DONE]":
                continue
            choices = json.loads(data).get("choices") or ()
            if any(choice["delta"].get("content") for choice in choices):
                return time.monotonic()
    raise BenchError("the first answer had no text")
