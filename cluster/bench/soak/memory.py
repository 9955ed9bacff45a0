"""Memory of a server's processes by role over time, and how much it grew.

Per process: resident set (RSS, with pages that it shares) and proportional set (PSS, every shared page
divided among those that share it). Only the sum of PSS is the memory of the server; the sum of RSS counts
libraries once a process. Growth is the median of the readings during the last tenth of the requests over that
during the second tenth, so that neither the warm-up (the first tenth) nor a single reading decides.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.bench.profile import PROCESSES, process_kind, server_processes
from cluster.bench.running import BenchError

TOTAL = "total"
MIB = 1 << 20
MEASURES = ("pss", "rss")
RAY_ROLES = {
    "raylet/raylet": "raylet",  # names its agents in its arguments
    "cluster.cli.main": "s2d serve",
    "bin/s2d": "s2d serve",
    "ServeController": "Serve controller",
    "RegistryActor": "registry",
    "gcs_server": "GCS",
    "DashboardAgent": "Ray agents",
    "RuntimeEnvAgent": "Ray agents",
    "dashboard/": "Ray agents",
    "log_monitor.py": "Ray agents",
    "monitor.py": "Ray agents",
}
"""By a mark in the command line, first match; other processes of Ray, idle workers among them, are "Ray"."""
ROLES = tuple(dict.fromkeys((*(p for p in PROCESSES if p != "client"), *RAY_ROLES.values())))


@dataclass(frozen=True, slots=True)
class MemorySample:
    """requests: ended so far. at_s: seconds since the first request. by_role: {"pss": bytes, "rss": bytes,
    "processes": how many} of each role and of the total."""

    requests: int
    at_s: float
    by_role: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class Growth:
    """before, after: bytes, medians of two windows; mib_per_1000: slope of a line through the readings after
    the warm-up, in MiB a thousand requests."""

    role: str
    measure: str
    before: float
    after: float
    mib_per_1000: float

    @property
    def percent(self) -> float:
        return 100.0 * (self.after / self.before - 1.0) if self.before else 0.0


def memory_role(command: str) -> str:
    """Which of `ROLES` a command line of the server's process tree belongs to."""
    kind = process_kind(command)
    return kind if kind != "Ray" else next((r for mark, r in RAY_ROLES.items() if mark in command), kind)


def read_memory(server_pid: int) -> dict[str, dict[str, int]]:
    """Of the process and its descendants now. Raises BenchError when the server itself is gone."""
    import psutil  # of the extra "bench"

    found = {role: {"pss": 0, "rss": 0, "processes": 0} for role in (*ROLES, TOTAL)}
    for process in server_processes(server_pid):
        try:
            command = " ".join(process.cmdline())
            memory = process.memory_full_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        for role in (memory_role(command), TOTAL):
            found[role]["pss"] += memory.pss
            found[role]["rss"] += memory.rss
            found[role]["processes"] += 1
    return found


def growth(samples: Sequence[MemorySample], requests: int) -> list[Growth]:
    """By role and the total, PSS before RSS. Raises BenchError when a window holds no reading: the run
    was too short for the interval between readings."""
    tenth = requests / 10
    early = [s for s in samples if tenth <= s.requests < 2 * tenth]
    late = [s for s in samples if s.requests >= requests - tenth]
    if not early or not late:
        raise BenchError(
            "no reading of memory in a tenth of the requests: more requests, or shorter intervals"
        )
    measured = [s for s in samples if s.requests >= tenth]
    return [
        Growth(
            role,
            measure,
            statistics.median(s.by_role[role][measure] for s in early),
            statistics.median(s.by_role[role][measure] for s in late),
            _slope(measured, role, measure),
        )
        for role in (*ROLES, TOTAL)
        for measure in MEASURES
    ]


def _slope(samples: Sequence[MemorySample], role: str, measure: str) -> float:
    xs = [float(s.requests) for s in samples]
    if len(set(xs)) < 2:
        return 0.0
    slope = statistics.linear_regression(xs, [s.by_role[role][measure] / MIB for s in samples]).slope
    return 1000.0 * slope


def worst_total(grown: Sequence[Growth]) -> Growth:
    """Of PSS and RSS the one that grew more."""
    return max((g for g in grown if g.role == TOTAL), key=lambda g: g.percent)
