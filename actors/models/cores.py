"""Whose processor cores a model computes on: two models that share them gain nothing by working at once."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Cores:
    """`host` names a machine, the same from every container on it, "" where it is not known; `cpus` are those
    of it that a model may run on, none for one that computes on an accelerator."""

    host: str = ""
    cpus: frozenset[int] = frozenset()

    def apart_from(self, other: Cores) -> bool:
        """Whether the two are known to have no core in common."""
        if not self.host or not other.host:
            return False
        return self.host != other.host or self.cpus.isdisjoint(other.cpus)


def check_cpus(cpus: Collection[int], field: str) -> None:
    """Raises ValueError, naming the field, for CPUs that this process may not run on."""
    allowed = os.sched_getaffinity(0)
    if missing := sorted(set(cpus) - allowed):
        raise ValueError(f"{field}: {missing} are not among the CPUs of this machine, {sorted(allowed)}")


def bind_threads(cpus: Collection[int], field: str) -> None:
    """Let all threads of this process, and those that they start, run on these CPUs only; without any, where
    they may run now. Raises what `check_cpus` raises."""
    if not cpus:
        return
    check_cpus(cpus, field)
    bound: set[int] = set()
    # Affinity is a thread's own. What one that is not bound yet starts meanwhile is found in the next look.
    while threads := {int(name) for name in os.listdir("/proc/self/task")} - bound:
        for thread in threads:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(thread, cpus)
        bound |= threads


def cores_of(device_type: str, boot_id: Path = BOOT_ID) -> Cores:
    """Those of a model of this process on a torch device type. CPU quotas of containers share the cores."""
    try:
        host = boot_id.read_text().strip()
    except OSError:  # not Linux
        host = platform.node()
    return Cores(host, frozenset(os.sched_getaffinity(0)) if device_type == "cpu" else frozenset())
