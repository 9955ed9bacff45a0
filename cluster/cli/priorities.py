"""On a machine whose every core computes, what manages must not interrupt what computes.

A target's threads meet at a barrier hundreds of times a round. Each time that Ray or the gateway wakes on one
of their cores, all of them wait. With the lowest priority, and as batch processes, which Linux never lets
preempt another when they wake, they run in the gaps of a round instead, which come every few milliseconds.
Linux's idle class would gain as much and can starve a process where two models compute; this cannot.

What a request passes through gives way less: at the lowest priority, first tokens wait for such a gap.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Collection
from pathlib import Path

ON_THE_WAY, MANAGING = 10, 19
NICENESS = {
    "ProxyActor": ON_THE_WAY,
    ":gateway": ON_THE_WAY,
    "ServeController": MANAGING,
    "RegistryActor": MANAGING,
    "RouterActor": MANAGING,
    "gcs_server": MANAGING,
    "DashboardAgent": MANAGING,
    "dashboard/dashboard.py": MANAGING,
    "log_monitor.py": MANAGING,
    "autoscaler/_private/monitor.py": MANAGING,
}
"""By marks in command lines. Not the raylet, whose children inherit its priority, and not idle workers, which
may become targets."""


def give_way(processes: Collection[int]) -> set[int]:
    """Lower the priority of every thread of those among `processes` that do not compute; returns these.
    Threads that they start later inherit it; what is gone or not ours is left alone. May be repeated."""
    lowered: set[int] = set()
    for pid in processes:
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            niceness = next((value for mark, value in NICENESS.items() if mark in command), None)
            if niceness is None:
                continue
            for task in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, int(task.name), niceness)
                    if sys.platform == "linux":
                        os.sched_setscheduler(int(task.name), os.SCHED_BATCH, os.sched_param(0))
            lowered.add(pid)
    return lowered
