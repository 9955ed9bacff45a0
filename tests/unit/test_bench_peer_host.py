"""The JSON-lines client of peers, against a real subprocess."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import cluster.bench.peers
from cluster.bench.engines.interface import BenchRequest, SpeculationCounts
from cluster.bench.engines.peer_host import HostError, HostTimeouts, PeerHost
from tests.processes import cancelled_while_running, eventually, state

FAKE = Path(__file__).parent.parent / "fake_peer_host.py"
PROTOCOL = Path(cluster.bench.peers.__file__).parent
QUICK = HostTimeouts(start_s=10.0, request_s=5.0, reset_s=2.0, stop_s=0.5)


def fake(*arguments: str, timeouts: HostTimeouts = QUICK) -> PeerHost:
    command = (sys.executable, "-S", str(FAKE), *arguments)
    return PeerHost(command, {"PYTHONPATH": str(PROTOCOL)}, timeouts)


@asynccontextmanager
async def running(*arguments: str, timeouts: HostTimeouts = QUICK) -> AsyncIterator[PeerHost]:
    host = fake(*arguments, timeouts=timeouts)
    await host.start()
    try:
        yield host
    finally:
        await host.stop()


def request(*prompt: int, max_tokens: int = 5, name: str = "r") -> BenchRequest:
    return BenchRequest(name, prompt, "", max_tokens)


def alive(pid: int) -> bool:
    """False for a zombie too."""
    return state(pid) not in ("Z", "gone")


async def test_tokens_arrive_as_they_come_with_the_counts_at_the_end() -> None:
    async with running("--step", "0.02") as host:
        response = await host.generate(request(40, 41))
    assert response.error is None
    assert response.token_ids == (42, 43, 44, 45, 46)
    assert response.finish_reason == "length"
    assert response.speculation == SpeculationCounts(3, 8, 5, (2, 2, 1))
    assert [count for _, count in response.arrivals] == [1] * 5
    # Stamped at arrival: five steps of 20 ms, not one burst at the end.
    assert response.arrivals[-1][0] - response.arrivals[0][0] > 0.03
    assert response.started < response.arrivals[0][0]


async def test_requests_overlap_and_keep_their_own_tokens() -> None:
    async with running("--step", "0.01") as host:
        started = time.perf_counter()
        requests = [request(100 * i, max_tokens=10, name="same id") for i in range(1, 9)]
        responses = await asyncio.gather(*(host.generate(r) for r in requests))
        took = time.perf_counter() - started
    for index, response in enumerate(responses, start=1):
        assert response.token_ids == tuple(range(100 * index + 1, 100 * index + 11))
    assert took < 8 * 10 * 0.01  # one after the other


async def test_a_crash_fails_every_request_with_the_last_error_output() -> None:
    async with running("--step", "0.05") as host:
        long = asyncio.create_task(host.generate(request(1, max_tokens=1000)))
        await asyncio.sleep(0.15)
        crashed = await host.generate(request(13))
        assert "exit status 9" in (crashed.error or "")
        assert "assertion failed: unlucky" in (crashed.error or "")
        survivor = await long
        assert "exit status 9" in (survivor.error or "")
        assert survivor.num_tokens > 0
        assert "exit status 9" in ((await host.generate(request(1))).error or "")
        with pytest.raises(HostError, match="exit status 9"):
            await host.reset()


async def test_a_request_without_an_answer_times_out_and_is_cancelled() -> None:
    timeouts = HostTimeouts(10.0, 0.2, 2.0, 0.5)
    async with running(timeouts=timeouts) as host:
        response = await host.generate(request(0))
        assert "not finished after" in (response.error or "")
        await host.reset()
        assert await seen_in_stderr(host, "r#0")
        assert (await host.generate(request(1))).error is None


async def test_cancelling_reaches_the_script() -> None:
    async with running("--step", "0.01") as host:
        task = asyncio.create_task(host.generate(request(1, max_tokens=10**6)))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await host.reset()
        assert await seen_in_stderr(host, "r#0")


async def seen_in_stderr(host: PeerHost, text: str) -> bool:
    for _ in range(100):
        if any(text in line for line in host.stderr):
            return True
        await asyncio.sleep(0.01)
    return False


async def test_a_refusal_is_the_error_of_its_request_alone() -> None:
    async with running() as host:
        assert (await host.generate(request(7))).error == "seven is refused"
        assert (await host.generate(request(8))).error is None


async def test_what_is_no_message_ends_the_trust_in_the_script() -> None:
    async with running() as host:
        assert "broke the protocol" in ((await host.generate(request(99))).error or "")
        assert "broke the protocol" in ((await host.generate(request(1))).error or "")


async def test_a_script_that_ends_at_once_says_why() -> None:
    with pytest.raises(HostError, match="exit status 3") as error:
        await fake("--fail", "start").start()
    assert "no such weights" in str(error.value)
    assert "this goes to standard error" in str(error.value)


async def test_a_script_that_is_never_ready_is_ended() -> None:
    host = fake("--fail", "silent", timeouts=HostTimeouts(0.5, 5.0, 2.0, 0.2))
    with pytest.raises(HostError, match="not ready after"):
        await host.start()


async def test_a_missing_interpreter_is_named() -> None:
    with pytest.raises(HostError, match="/no/such/python"):
        await PeerHost(("/no/such/python",)).start()


async def test_stop_ends_a_deaf_script_and_its_children() -> None:
    host = fake("--child", "--fail", "deaf", timeouts=HostTimeouts(10.0, 5.0, 2.0, 0.2))
    child = int((await host.start())["versions"]["child"])
    assert alive(child)
    await host.stop()
    await host.stop()
    for _ in range(100):
        if not alive(child):
            break
        await asyncio.sleep(0.01)
    else:
        pytest.fail("the child outlived the stop")
    assert (await host.generate(request(1))).error == "stopped"


async def test_a_stop_that_is_cancelled_kills_what_is_left() -> None:
    # It would end by itself after a minute.
    arguments = ("--child", "--fail", "deaf", "--grace", "60")
    host = fake(*arguments, timeouts=HostTimeouts(10.0, 5.0, 2.0, 60.0))
    child = int((await host.start())["versions"]["child"])
    script = host._process
    assert script is not None
    await cancelled_while_running(host.stop(), script)
    async with asyncio.timeout(10.0):
        assert await script.wait() == -signal.SIGKILL
    assert eventually(lambda: not alive(child))


def test_a_script_that_still_loads_ends_with_the_benchmark() -> None:
    command = [sys.executable, str(FAKE), "--fail", "silent", "--child", "--grace", "0.1"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        env=os.environ | {"PYTHONPATH": str(PROTOCOL)},
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        assert process.stdin is not None
        process.stderr.readline()
        child = int(process.stderr.readline())
        assert alive(child)
        process.stdin.close()
        process.wait(timeout=5)
    deadline = time.monotonic() + 5
    while alive(child):
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.01)
