"""Managing processes give way; what computes does not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.models.threads import takes_every_core
from cluster.cli.priorities import give_way

SLEEPER = """
import threading, time
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print(1, flush=True)
time.sleep(60)
"""


@pytest.fixture
def processes() -> Iterator[dict[str, int]]:
    names = ("s2d:gateway", "s2d:target-m", "ray::IDLE", "ray::ProxyActor", "ray::ServeController")
    command = [sys.executable, "-c", SLEEPER]
    running = {name: subprocess.Popen([*command, name], stdout=subprocess.PIPE) for name in names}
    for process in running.values():
        assert process.stdout is not None
        process.stdout.readline()
    yield {name: process.pid for name, process in running.items()}
    for process in running.values():
        process.kill()
        process.wait()


def test_every_thread_of_managing_processes_gives_way(processes: dict[str, int]) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    gone = 2**22 - 1
    expected = {
        processes["s2d:gateway"]: (5, os.SCHED_OTHER),
        processes["ray::ProxyActor"]: (5, os.SCHED_OTHER),
        processes["ray::ServeController"]: (19, os.SCHED_BATCH),
    }
    assert give_way([*processes.values(), gone]) == set(expected)
    for pid in processes.values():
        tasks = [int(t.name) for t in Path(f"/proc/{pid}/task").iterdir()]
        assert len(tasks) == 2
        niceness, policy = expected.get(pid, (before, os.SCHED_OTHER))
        assert {os.getpriority(os.PRIO_PROCESS, task) for task in tasks} == {niceness}
        assert {os.sched_getscheduler(task) for task in tasks} == {policy}


def test_whether_threads_take_every_core() -> None:
    cpus = len(os.sched_getaffinity(0))
    assert takes_every_core(cpus)
    assert not takes_every_core(cpus - 1) or cpus == 1
