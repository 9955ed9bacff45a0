"""Where the time of our own server goes: the engine thread by part of a round, and processor time by process.

The engine counts its phases itself (`actors.engine.phases`); snapshots before and after a block of requests
are subtracted. Processor time is what the operating system booked on each process of the server.
"""

from __future__ import annotations

import importlib.util
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.bench.config import ProfileSettings
from cluster.bench.datasets import Question
from cluster.bench.engines.interface import BenchEngine, BenchRequest
from cluster.bench.engines.s2d import S2DEngine
from cluster.bench.load import closed_loop, load_requests
from cluster.bench.rendering import PromptRenderer
from cluster.bench.running import BenchError, reset, rotated, warm_up

if TYPE_CHECKING:
    import psutil

PARTS = (
    "target forward",
    "draft forward",
    "wire",
    "sampling",
    "scheduling",
    "between rounds",
    "no request inside",
)
"""draft forward: drafting, wherever it runs, as far as the engine waited for it; wire: the rest of that wait;
sampling: judging the round's rows; scheduling: packing, bookkeeping, planning, candidates; between rounds:
handing tokens over; no request inside: HTTP, Serve and the client between two requests."""
PROCESSES = ("target worker", "draft worker", "gateway", "proxy", "Ray", "client")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Counters of one engine at `at_s` of its process's clock, in seconds. `draft_s`: spent on drafting,
    here or in the worker."""

    at_s: float
    steps: int
    phases: Mapping[str, float]
    idle_s: float
    draft_s: float

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Snapshot:
        """From the body of GET /state; the first replica of the first model."""
        engine = state["models"][0]["replicas"][0]["engine"]
        source = engine["draft_source"]
        places = (source, source.get("remote", {}), source.get("local", {}))
        return cls(
            engine["clock_s"],
            engine["steps"],
            engine["phase_seconds"],
            engine["idle_s"],
            sum(float(place.get("draft_s", 0.0)) for place in places),
        )


def split(before: Snapshot, after: Snapshot, wall_s: float) -> dict[str, float]:
    """Seconds by part; they add up to `wall_s` unless the engine's own times exceed it.

    wall_s: from first request sent to last token, which lies between the snapshots; outside of it no request
    is inside the engine.
    """
    phase = {name: seconds - before.phases[name] for name, seconds in after.phases.items()}
    drafting = min(phase["drafts"], after.draft_s - before.draft_s)
    parts = {
        "target forward": phase["forward"],
        "draft forward": drafting,
        "wire": phase["drafts"] - drafting,
        "sampling": phase["judge"],
        "scheduling": phase["schedule"] + phase["learn"] + phase["commit"] + phase["submit"],
    }
    outside = after.at_s - before.at_s - wall_s
    idle = max(0.0, after.idle_s - before.idle_s - outside)
    parts["between rounds"] = max(0.0, wall_s - sum(parts.values()) - idle)
    parts["no request inside"] = idle
    return parts


@dataclass(frozen=True, slots=True)
class ProfileRow:
    """One engine at one concurrency. parts, cpu: seconds in all."""

    engine: str
    concurrency: int
    rounds: int
    tokens: int
    wall_s: float
    parts: Mapping[str, float]
    cpu: Mapping[str, float]


def process_kind(command: str) -> str:
    """Which of `PROCESSES` a command line of the server's process tree belongs to."""
    if "ServeReplica" in command:
        marks = {"draft-pool": "draft worker", "gateway": "gateway"}
        return next((kind for mark, kind in marks.items() if mark in command), "target worker")
    return "proxy" if "ProxyActor" in command else "Ray"


def require_psutil() -> None:
    """Raises BenchError without psutil, to be asked before anything is started."""
    if importlib.util.find_spec("psutil") is None:
        raise BenchError("psutil is not installed; run: pip install 's2d-serve[bench]'")


def server_processes(server_pid: int) -> list[psutil.Process]:
    """The server and all that it started. Raises BenchError when it is gone."""
    import psutil  # of the extra "bench"

    try:
        root = psutil.Process(server_pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess as error:
        raise BenchError("the server has ended") from error


def cpu_seconds(server_pid: int) -> dict[str, float]:
    """Processor seconds so far, user and system, by kind of process; our own count as the client. Raises
    BenchError when the server is gone."""
    import psutil

    total = dict.fromkeys(PROCESSES, 0.0) | {"client": sum(os.times()[:2])}
    for process in server_processes(server_pid):
        try:
            times = process.cpu_times()
            total[process_kind(" ".join(process.cmdline()))] += times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return total


async def run_profile(
    engines: Sequence[BenchEngine],
    questions: Sequence[Question],
    renderer: PromptRenderer,
    settings: ProfileSettings,
    advance: Callable[[ProfileRow], None] = lambda row: None,
) -> list[ProfileRow]:
    """Rows by concurrency, then by engine. Raises BenchError for engines that are not our own, and when one
    cannot be warmed up or reset, or a request fails."""
    ours = [engine for engine in engines if isinstance(engine, S2DEngine)]
    if len(ours) != len(engines):
        raise BenchError("only engines of our own (s2d-...) can be profiled")
    rows: dict[tuple[int, str], list[ProfileRow]] = {}
    for concurrency in settings.concurrency:
        count = concurrency * settings.requests_per_stream
        for pair in range(settings.pairs):
            asked = [questions[(pair * count + i) % len(questions)] for i in range(count)]
            requests = load_requests(asked, renderer, settings, pair)
            for engine in rotated(ours, pair):
                if pair == 0:
                    await warm_up(engine, requests[:concurrency], settings.request_timeout_s)
                await reset(engine)
                row = await _block(engine, requests, concurrency, settings.request_timeout_s)
                rows.setdefault((concurrency, engine.name), []).append(row)
                advance(row)
    order = [(c, e.name) for c in settings.concurrency for e in ours]
    return [_sum(rows[key]) for key in order]


async def _block(
    engine: S2DEngine, requests: Sequence[BenchRequest], concurrency: int, timeout_s: float
) -> ProfileRow:
    server = engine.server
    before, cpu_before = Snapshot.of(await server.state()), cpu_seconds(server.pid)
    responses = await closed_loop(engine, requests, concurrency, timeout_s)
    cpu_after, after = cpu_seconds(server.pid), Snapshot.of(await server.state())
    failed = next((r.error for r in responses if r.error is not None), None)
    if failed is not None:
        raise BenchError(f"{engine.name}: {failed}")
    wall_s = max(r.finished for r in responses) - min(r.started for r in responses)
    return ProfileRow(
        engine.name,
        concurrency,
        after.steps - before.steps,
        sum(r.num_tokens for r in responses),
        wall_s,
        split(before, after, wall_s),
        {kind: cpu_after[kind] - cpu_before[kind] for kind in PROCESSES},
    )


def _sum(rows: Sequence[ProfileRow]) -> ProfileRow:
    parts: defaultdict[str, float] = defaultdict(float)
    cpu: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        for total, values in ((parts, row.parts), (cpu, row.cpu)):
            for name, seconds in values.items():
                total[name] += seconds
    return ProfileRow(
        rows[0].engine,
        rows[0].concurrency,
        sum(r.rounds for r in rows),
        sum(r.tokens for r in rows),
        sum(r.wall_s for r in rows),
        dict(parts),
        dict(cpu),
    )
