"""On a machine whose every core computes, what manages must not interrupt what computes.

A target's threads meet at a barrier hundreds of times a round. Each time that Ray or the gateway wakes on one
of their cores, all of them wait. With the lowest priority, and as batch processes, which Linux never lets
preempt another when they wake, they run in the gaps of a round instead, which come every few milliseconds.
Linux's idle class would gain as much and can starve a process where two models compute; this cannot.

What a request passes through must not wait for such a gap with its first token. It gives way too, but little.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Collection
from pathlib import Path

ON_THE_WAY = ("ProxyActor", ":gateway")
"""Marks in command lines of what requests and answers pass through."""
ON_THE_WAY_NICENESS = 5
NICENESS = 19
MANAGING = (
    "ServeController",
    "RegistryActor",
    "gcs_server",
    "DashboardAgent",
    "dashboard/dashboard.py",
    "log_monitor.py",
    "autoscaler/_private/monitor.py",
)
"""Marks in command lines. Not the raylet, whose children inherit its priority, and not idle workers, which
may become targets."""


def give_way(processes: Collection[int]) -> set[int]:
    """Lower the priority of every thread of those among `processes` that do not compute; returns these.
    Threads that they start later inherit it; what is gone or not ours is left alone. May be repeated."""
    lowered: set[int] = set()
    for pid in processes:
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            on_the_way = any(mark in command for mark in ON_THE_WAY)
            if not on_the_way and not any(mark in command for mark in MANAGING):
                continue
            for task in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(OSError):
                    niceness = ON_THE_WAY_NICENESS if on_the_way else NICENESS
                    os.setpriority(os.PRIO_PROCESS, int(task.name), niceness)
                    if sys.platform == "linux" and not on_the_way:
                        os.sched_setscheduler(int(task.name), os.SCHED_BATCH, os.sched_param(0))
            lowered.add(pid)
    return lowered
