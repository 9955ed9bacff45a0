"""Growth of memory from readings, and the mixture of requests."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from cluster.bench.config import SoakSettings
from cluster.bench.running import BenchError
from cluster.bench.soak import command as soaking
from cluster.bench.soak.memory import (
    MIB,
    ROLES,
    TOTAL,
    Growth,
    MemorySample,
    growth,
    memory_role,
    read_memory,
    worst_total,
)
from cluster.bench.soak.report import SoakResults, plot_soak, soak_tables
from cluster.bench.soak.traffic import SoakRequest, count_kinds, requests, send


def sample(ended: int, target_mib: float, rest_mib: float = 100.0) -> MemorySample:
    by_role = {role: {"pss": 0, "rss": 0, "processes": 1} for role in (*ROLES, TOTAL)}
    for role, mib in (("target worker", target_mib), ("Ray", rest_mib), (TOTAL, target_mib + rest_mib)):
        by_role[role] |= {"pss": int(mib * MIB), "rss": int(2 * mib * MIB)}
    return MemorySample(ended, float(ended), by_role)


def of(grown: list[Growth], role: str, measure: str = "pss") -> Growth:
    return next(g for g in grown if (g.role, g.measure) == (role, measure))


def test_growth_leaves_the_warm_up_out() -> None:
    samples = [sample(n, 300.0 if n < 100 else 900.0 + n / 10) for n in range(0, 1001, 10)]
    grown = growth(samples, 1000)
    target = of(grown, "target worker")
    assert target.before / MIB == pytest.approx(914.5, abs=0.1)  # median of 100..190 requests
    assert target.after / MIB == pytest.approx(995.0, abs=0.1)
    assert target.percent == pytest.approx(100 * (995.0 / 914.5 - 1), abs=0.02)
    assert target.mib_per_1000 == pytest.approx(100.0, abs=0.1)
    assert of(grown, "Ray").percent == 0.0
    assert of(grown, "draft worker").percent == 0.0  # nothing there: no division by zero
    assert worst_total(grown).percent == pytest.approx(100 * (1095.0 / 1014.5 - 1), abs=0.02)


def test_one_reading_that_is_off_does_not_decide() -> None:
    samples = [sample(n, 900.0) for n in range(0, 1001, 10)]
    samples[-3] = sample(980, 2000.0)
    assert worst_total(growth(samples, 1000)).percent == 0.0


def test_too_few_readings_are_an_error() -> None:
    with pytest.raises(BenchError, match="no reading of memory"):
        growth([sample(0, 1.0), sample(1000, 1.0)], 1000)


def test_our_own_process_can_be_read() -> None:
    found = read_memory(os.getpid())
    assert found[TOTAL]["processes"] >= 1
    assert found[TOTAL]["rss"] > MIB
    assert found[TOTAL]["pss"] > 0


def test_a_server_that_has_ended_is_an_error() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(60)
    with pytest.raises(BenchError, match="the server has ended"):
        read_memory(process.pid)


@pytest.mark.parametrize("readings", [0, 1])
async def test_a_reader_that_fails_ends_the_soak(readings: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [sample(0, 1.0).by_role] * readings

    def read(pid: int) -> Any:
        if not left:
            raise BenchError("the server has ended")
        return left.pop()

    async def never(client: object, request: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(soaking, "read_memory", read)
    monkeypatch.setattr(soaking, "send", never)
    server: Any = SimpleNamespace(url="http://server", headers={}, model="m", pid=1)
    settings = SoakSettings(requests=20, concurrency=2, sample_s=0.01)
    results = SoakResults(20)
    async with asyncio.timeout(30) as limit:  # of a request: 120 s
        with pytest.raises(BenchError, match="the server has ended"):
            await soaking.soak(server, settings, results, lambda: None)
    assert not limit.expired()
    assert (results.ended, len(results.samples)) == (0, readings)


async def test_without_psutil_no_server_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setattr(soaking, "S2DServer", started.append)
    monkeypatch.setattr(soaking, "environment", dict)
    with pytest.raises(BenchError, match=r"s2d-serve\[bench\]"):
        await soaking.measure_soak(SoakSettings(), tmp_path)
    assert started == []


@pytest.mark.parametrize(
    ("command", "role"),
    [
        ("ray::ServeReplica:s2d:gateway", "gateway"),
        ("ray::ServeController.listen_for_change", "Serve controller"),
        ("/lib/ray/core/src/ray/gcs/gcs_server --log_dir=/tmp", "GCS"),
        ("/lib/ray/raylet/raylet --agent_command=dashboard/agent.py", "raylet"),
        ("ray-dashboard-DashboardAgent-0", "Ray agents"),
        ("python -m cluster.cli.main serve -c c.yaml", "s2d serve"),
        ("ray::IDLE", "Ray"),
    ],
)
def test_roles_tell_the_parts_of_ray(command: str, role: str) -> None:
    assert memory_role(command) == role
    assert role in ROLES


def test_requests_are_mixed_reproducible_and_distinct() -> None:
    texts = [f"text {i} " * 30 for i in range(20)]
    drawn = requests("m", texts, 400, 7)
    assert drawn == requests("m", texts, 400, 7)
    assert drawn != requests("m", texts, 400, 8)
    kinds = count_kinds(drawn)
    assert sum(kinds.values()) == 400
    assert {"chat, greedy, whole", "completion, sampled, cancelled"} <= kinds.keys()
    assert len(kinds) == 12
    prompts = [str(r.body.get("prompt") or r.body["messages"]) for r in drawn]
    assert len(set(prompts)) == 400
    assert all(r.body["stream"] for r in drawn if r.cancel_after is not None)


def answering(text: str, status: int = 200) -> httpx.AsyncClient:
    transport = httpx.MockTransport(lambda request: httpx.Response(status, text=text))
    return httpx.AsyncClient(transport=transport, base_url="http://server")


STREAMED = SoakRequest("/v1/completions", {"stream": True, "temperature": 0.0})
WHOLE = SoakRequest("/v1/completions", {"stream": False, "temperature": 0.0})
LEAVING = SoakRequest("/v1/completions", {"stream": True, "temperature": 0.0}, cancel_after=1)
PART = 'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n'
END = 'data: {"choices": [{"text": "", "finish_reason": "stop"}]}\n\n'


@pytest.mark.parametrize(
    ("request_", "text", "status", "says"),
    [
        (STREAMED, PART + END + "data: [DONE]\n\n", 200, None),
        (STREAMED, PART + "data: [DONE]\n\n", 200, "before the answer did"),
        (STREAMED, PART, 200, r"without \[DONE\]"),
        (STREAMED, 'data: {"error": {"message": "no"}}\n\n', 200, "no"),
        (STREAMED, "busy", 429, "HTTP 429: busy"),
        (LEAVING, PART + PART, 200, None),
        (WHOLE, '{"choices": [{"finish_reason": "length"}]}', 200, None),
        (WHOLE, '{"choices": [{"finish_reason": null}]}', 200, "without a reason"),
        (WHOLE, "not json", 200, "not an answer"),
        (WHOLE, "gone", 503, "HTTP 503"),
    ],
)
async def test_failures_are_told(request_: SoakRequest, text: str, status: int, says: str | None) -> None:
    async with answering(text, status) as client:
        problem = await send(client, request_)
    assert problem is None if says is None else re.search(says, problem or "")


def test_tables_and_picture(tmp_path: Path) -> None:
    samples = [sample(n, 900.0 + n / 10) for n in range(0, 101, 5)]
    results = SoakResults(100, {"kind": 100}, samples, ["it broke", "it broke"], 100, 3, 60.0)
    growth_table, kinds, failures = soak_tables(results, growth(samples, 100), 2.0)
    assert [row[0] for row in growth_table.rows] == [*ROLES, TOTAL]
    assert kinds.title.startswith("Requests: 100 ended")
    assert failures.rows == (("it broke", "2"),)
    plot_soak(results, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 1000
