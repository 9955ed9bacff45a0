"""The comparison that `s2d simulate` runs: the router against what else the same hardware could do."""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from functools import partial
from multiprocessing.queues import Queue

from cluster.simulator.baselines import DraftPerModel, FixedExit, NoSpeculation
from cluster.simulator.profile import CostProfile
from cluster.simulator.scenario import Scenario
from cluster.simulator.simulation import Policy, RouterPolicy, RunResult, simulate

FIXED_LENGTHS = (2, 4)
PROGRESS_S = 0.2
Progress = Callable[[str, float], None]
_told: Queue[tuple[str, float]] | None = None
"""In a worker process: where progress is told."""


def policies(profile: CostProfile) -> list[Policy]:
    """No speculation first: ratios refer to it."""
    fixed = [FixedExit(depth, length) for depth in sorted(profile.exits) for length in FIXED_LENGTHS]
    return [NoSpeculation(), RouterPolicy(), RouterPolicy(draft_ahead=True), DraftPerModel(), *fixed]


def compare(
    profile: CostProfile,
    scenario: Scenario,
    chosen: Sequence[Policy],
    progress: Progress = lambda name, seconds: None,
) -> list[RunResult]:
    """One run a policy, as many at a time as this process has CPUs; `progress` gets its name and the
    simulated seconds so far."""
    context = multiprocessing.get_context("spawn")
    told: Queue[tuple[str, float]] = context.Queue()
    workers = min(len(chosen), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, context, _begin, (told,)) as pool:
        runs = [pool.submit(_run, profile, scenario, policy) for policy in chosen]
        try:
            _report(runs, told, progress)
            return [run.result() for run in runs]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _report(runs: Sequence[Future[RunResult]], told: Queue[tuple[str, float]], progress: Progress) -> None:
    """Pass progress on until all runs are over."""
    while wait(runs, timeout=PROGRESS_S).not_done:
        try:
            while True:
                progress(*told.get_nowait())
        except queue.Empty:
            pass


def _begin(told: Queue[tuple[str, float]]) -> None:
    global _told  # the one way to hand a queue to the workers of a pool
    _told = told


def _run(profile: CostProfile, scenario: Scenario, policy: Policy) -> RunResult:
    return simulate(profile, scenario, policy, partial(_tell, policy.name))


def _tell(name: str, now: float) -> None:
    if _told is not None:
        _told.put((name, now))
