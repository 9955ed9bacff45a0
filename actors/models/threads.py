"""How many compute threads this process should use."""

from __future__ import annotations

import math
import os
from pathlib import Path

CPU_ROOT = Path("/sys/devices/system/cpu")
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def physical_cores(cpu_root: Path = CPU_ROOT, cgroup_quota: Path = CGROUP_QUOTA) -> int:
    """Physical cores this process may run on: its CPU affinity without hyperthread siblings, and no more than
    its container's CPU quota (cgroup v2), rounded up. At least 1."""
    cores = len(cpus_of_cores(cpu_root))
    return max(1, min(cores, _quota(cgroup_quota) or cores))


def cpus_of_cores(cpu_root: Path = CPU_ROOT) -> list[list[int]]:
    """The CPUs this process may run on, ascending, by the physical core that they share."""
    cores: dict[tuple[str, str], list[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        topology = cpu_root / f"cpu{cpu}" / "topology"
        try:
            package = (topology / "physical_package_id").read_text().strip()
            core = (topology / "core_id").read_text().strip()
        except OSError:  # a sandbox without /sys: every CPU counts as a core
            package, core = "", str(cpu)
        cores.setdefault((package, core), []).append(cpu)
    return list(cores.values())


def _quota(file: Path) -> int | None:
    try:
        quota, period = file.read_text().split()[:2]
        return None if quota == "max" else math.ceil(int(quota) / int(period))
    except (OSError, ValueError):
        return None


def takes_every_core(threads: int) -> bool:
    """Whether so many compute threads (0: one a physical core) leave no CPU of this process to others."""
    return (threads or physical_cores()) >= len(os.sched_getaffinity(0))
