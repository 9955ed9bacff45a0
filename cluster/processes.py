"""Processes of this machine: who is below whom, and how they end."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path


def _stat(pid: int) -> tuple[int, int] | None:
    """(parent, start time in clock ticks) of a process, None when it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else (int(fields[1]), int(fields[19]))


def descendants(root: int) -> dict[int, int]:
    """Processes below `root`: pid to start time, which tells a process from a later one of the same pid."""
    stats = {int(p.name): _stat(int(p.name)) for p in Path("/proc").iterdir() if p.name.isdigit()}
    found: dict[int, int] = {}
    frontier = {root}
    while frontier:
        children = {
            pid: stat[1]
            for pid, stat in stats.items()
            if stat is not None and stat[0] in frontier and pid not in found
        }
        found |= children
        frontier = set(children)
    return found


def names_of(processes: dict[int, int]) -> set[str]:
    """Kernel names (15 characters at most) of processes that still run."""
    names: set[str] = set()
    for pid, started in processes.items():
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
            if _alive(pid, started):
                names.add(name)
    return names


def _alive(pid: int, started: int) -> bool:
    stat = _stat(pid)
    return stat is not None and stat[1] == started


def end_processes(processes: dict[int, int], timeout_s: float) -> None:
    """Wait for processes to end by themselves, then kill those that have not."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not any(_alive(pid, started) for pid, started in processes.items()):
            return
        time.sleep(0.1)
    for pid, started in processes.items():
        if _alive(pid, started):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
