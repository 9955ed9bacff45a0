"""Whose processor cores a model computes on: two models that share them gain nothing by working at once."""

from __future__ import annotations

import os
import platform
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


def cores_of(device_type: str, boot_id: Path = BOOT_ID) -> Cores:
    """Those of a model of this process on a torch device type. CPU quotas of containers share the cores."""
    try:
        host = boot_id.read_text().strip()
    except OSError:  # not Linux
        host = platform.node()
    return Cores(host, frozenset(os.sched_getaffinity(0)) if device_type == "cpu" else frozenset())
