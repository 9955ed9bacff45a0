"""Exclusive turns with real processes: who is stopped when, and that nobody stays stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.bench import guardian as guardian_module
from cluster.bench.guardian import Guardian
from cluster.bench.turns import Turns
from cluster.processes import descendants
from tests.fake_bench_engine import FakeEngine
from tests.processes import eventually, state

ROOT = Path(__file__).parent.parent.parent
TREE = "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])"


def stopped(tree: list[int]) -> bool:
    return eventually(lambda: all(state(pid) == "T" for pid in tree))


def going(tree: list[int]) -> bool:
    return eventually(lambda: all(state(pid) in "RS" for pid in tree))


@pytest.fixture
def trees() -> Iterator[list[list[int]]]:
    """Two engines' processes: parent and child each."""
    roots = [subprocess.Popen([sys.executable, "-S", "-c", TREE]) for _ in range(2)]
    try:
        assert eventually(lambda: all(len(descendants(root.pid)) == 1 for root in roots))
        found = [[root.pid, *descendants(root.pid)] for root in roots]
        # On busy cores a child may still be starting: then it runs, and what a test sees of it is chance.
        assert eventually(lambda: all(state(pid) == "S" for tree in found for pid in tree), 30.0)
        yield found
    finally:
        for root in roots:
            for pid in (*descendants(root.pid), root.pid):
                os.kill(pid, signal.SIGKILL)
            root.wait()


async def test_all_but_one_are_stopped_and_nobody_afterwards(trees: list[list[int]]) -> None:
    one, other = trees
    a, b, url = FakeEngine("a", pid=one[0]), FakeEngine("b", pid=other[0]), FakeEngine("url")
    with Turns([a, b, url], exclusive=True, settle_s=0.0) as turns:
        assert going(one + other)
        await turns.give_to(a)
        assert stopped(other)
        assert going(one)
        await turns.give_to(FakeEngine("a, another configuration", pid=one[0]))
        assert going(one)
        await turns.give_to(b)
        assert stopped(one)
        assert going(other)
        await turns.give_to(url)
        assert stopped(one + other)
    assert going(one + other)


async def test_everybody_is_alone_and_idle_once_before_the_first_turn(trees: list[list[int]]) -> None:
    one, other = trees
    a, b, url = FakeEngine("a", pid=one[0]), FakeEngine("b", pid=other[0]), FakeEngine("url")
    again = FakeEngine("a, another configuration", pid=one[0])
    seen: list[tuple[bool, bool]] = []

    async def looked() -> None:
        while True:
            await asyncio.sleep(0.02)
            seen.append((stopped(other), stopped(one)))

    with Turns([a, b, again, url], exclusive=True, settle_s=0.0) as turns:
        looking = asyncio.create_task(looked())
        began = time.perf_counter()
        await turns.begin(quiet_s=0.5)
        assert time.perf_counter() - began >= 1.0
        looking.cancel()
    assert {(True, False), (False, True)} <= set(seen)
    with Turns([a, b]) as turns:
        await turns.begin(quiet_s=60.0)  # without exclusive nobody is ever alone


async def test_without_exclusive_nobody_is_stopped(trees: list[list[int]]) -> None:
    a, b = (FakeEngine(str(tree[0]), pid=tree[0]) for tree in trees)
    with Turns([a, b]) as turns:
        await turns.give_to(a)
        assert [state(pid) for pid in trees[1]] == ["S", "S"]


async def test_only_who_was_stopped_is_given_time_to_settle(trees: list[list[int]]) -> None:
    a, b = (FakeEngine(str(tree[0]), pid=tree[0]) for tree in trees)
    with Turns([a, b], exclusive=True, settle_s=0.3) as turns:
        for engine, waits in ((a, False), (a, False), (b, True), (b, False), (a, True)):
            began = time.perf_counter()
            await turns.give_to(engine)
            assert (time.perf_counter() - began >= 0.3) == waits


@pytest.mark.parametrize("error", [KeyboardInterrupt, asyncio.CancelledError, RuntimeError])
async def test_whatever_ends_the_run_nobody_stays_stopped(
    trees: list[list[int]], error: type[BaseException]
) -> None:
    a, b = (FakeEngine(str(tree[0]), pid=tree[0]) for tree in trees)

    async def run() -> None:
        with Turns([a, b], exclusive=True) as turns:
            await turns.give_to(a)
            raise error

    with pytest.raises(error):
        await run()
    assert going(trees[0] + trees[1])


async def test_an_engine_that_has_died_is_no_obstacle(trees: list[list[int]]) -> None:
    a, b = (FakeEngine(str(tree[0]), pid=tree[0]) for tree in trees)
    with Turns([a, b], exclusive=True, settle_s=0.0) as turns:
        await turns.give_to(a)
        os.kill(trees[1][0], signal.SIGKILL)  # its child stays
        assert eventually(lambda: state(trees[1][0]) == "Z")
        await turns.give_to(b)
        assert going(trees[1][1:])
        os.kill(trees[1][1], signal.SIGKILL)


async def test_nothing_is_stopped_without_a_guardian(
    trees: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guardian_module, "SCRIPT", Path("/no/such/file"))
    a, b = (FakeEngine(str(tree[0]), pid=tree[0]) for tree in trees)
    with Turns([a, b], exclusive=True) as turns:
        assert turns._guardian is not None
        turns._guardian.process.wait(10)
        with pytest.raises(OSError, match="Broken pipe"):
            await turns.give_to(a)
    assert going(trees[0] + trees[1])


def test_a_killed_benchmark_leaves_nobody_stopped(trees: list[list[int]]) -> None:
    one, other = trees
    program = f"""
import asyncio
from cluster.bench.turns import Turns
from tests.fake_bench_engine import FakeEngine
async def main():
    a, b = FakeEngine("a", pid={one[0]}), FakeEngine("b", pid={other[0]})
    with Turns([a, b], exclusive=True) as turns:
        await turns.give_to(a)
        print("stopped", flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as benchmark:
        assert benchmark.stdout is not None
        assert benchmark.stdout.readline() == "stopped\n"
        assert stopped(other)
        benchmark.kill()
    assert going(one + other)


def test_the_guardian_sends_what_was_said_last_and_nothing_when_closed(trees: list[list[int]]) -> None:
    (one, child), (other, last) = trees
    guardian = Guardian()
    guardian.will_send([(one, signal.SIGSTOP), (child, signal.SIGSTOP)])
    guardian.will_send([(other, signal.SIGSTOP)])
    assert guardian.process.stdin is not None
    guardian.process.stdin.close()  # as when this process is killed
    assert guardian.process.wait(10) == 0
    assert stopped([other])
    assert going([one, child, last])
    closed = Guardian()
    closed.will_send([(one, signal.SIGSTOP)])
    closed.close()
    assert closed.process.returncode == 0
    assert going([one])


def test_a_later_process_of_the_same_id_gets_no_signal(
    trees: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = iter(["before", "after"])
    monkeypatch.setattr(guardian_module, "started", lambda pid: next(starts))
    guardian_module.guard([f"[[{trees[0][0]}, {int(signal.SIGSTOP)}]]"])
    assert going(trees[0])
    assert not list(starts)
