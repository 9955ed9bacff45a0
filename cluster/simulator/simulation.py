"""One run: targets, pool and a policy on one clock; what it gave, and what the router did."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from cluster.router.reports import Assignment, DraftReport, TargetReport
from cluster.router.router import Router
from cluster.simulator.draft_pool import SimulatedDraftWorker
from cluster.simulator.events import Clock
from cluster.simulator.profile import CostProfile
from cluster.simulator.scenario import STEP_S, Scenario, arrivals, models_of, pool_names
from cluster.simulator.target import Session, SimulatedTarget


class Policy(Protocol):
    """Decides once a second. `workers(profile, scenario)`: ids of the draft workers it uses. `batches`:
    whether these can draft for all targets at once, `draft_ahead`: whether they prepare drafts while targets
    verify."""

    name: str
    batches: bool
    draft_ahead: bool

    def workers(self, profile: CostProfile, scenario: Scenario) -> list[str]: ...

    def step(
        self, now: float, targets: Sequence[TargetReport], drafts: Sequence[DraftReport]
    ) -> dict[str, Assignment]: ...


@dataclass(slots=True)
class RunResult:
    """tokens_per_s: all targets, after the warm-up. speed: geometric mean over targets of tokens a second of
    busy time. utilisation: of the pool. highest_plan: greatest predicted load of a worker, shadow scoring and
    all. unsorted: assignments that are shallower than one of a cheaper target, over all steps. sessions:
    arrived. foreseen, partly: share of the drafts after the first of a session that were prepared while the
    target verified, whole and in part."""

    policy: str
    tokens_per_s: float
    speed: float
    utilisation: float
    highest_plan: float = 0.0
    unsorted: int = 0
    sessions: int = 0
    foreseen: float = 0.0
    partly: float = 0.0
    changes_per_target_minute: float = 0.0
    speed_by_model: dict[str, float] = field(default_factory=dict)


def simulate(
    profile: CostProfile,
    scenario: Scenario,
    policy: Policy,
    progress: Callable[[float], None] = lambda now: None,
) -> RunResult:
    """The same arrivals for every policy; equal inputs give equal results."""
    clock = Clock()
    pool = {
        worker_id: SimulatedDraftWorker(clock, profile.draft_s, batches=policy.batches)
        for worker_id in policy.workers(profile, scenario)
    }
    models = models_of(profile, scenario)
    targets = [
        SimulatedTarget(
            f"t{i:03}", model, profile, clock, random.Random(f"{scenario.seed}/{i}"), pool,
            scenario.max_running, scenario.max_draft, scenario.noise, policy.draft_ahead,
        )
        for i, model in enumerate(models)
    ]  # fmt: skip
    sessions = 0
    for number, arrival in enumerate(arrivals(profile, scenario, models)):
        sessions = number + 1
        session = Session(number, arrival.task, arrival.tokens)
        clock.after(arrival.at_s, partial(targets[arrival.target].arrive, session))
    result = RunResult(policy.name, 0.0, 0.0, 0.0, sessions=sessions)
    marks: list[tuple[int, float]] = []
    drafting_at_mark, changes_at_mark = 0.0, 0
    marked_at: float | None = None
    changes = 0
    drafted_before = dict.fromkeys(pool, 0.0)
    for now in scenario.step_times:
        if marked_at is None and now >= scenario.warmup_s:
            marks = [(t.emitted, t.busy_s) for t in targets]
            drafting_at_mark = sum(w.total_busy_s for w in pool.values())
            marked_at, changes_at_mark = now, changes
        reports = [t.report(STEP_S) for t in targets]
        drafts = [
            DraftReport(
                name, profile.draft_s, max_sessions=100_000,
                utilisation=min(1.0, (w.total_busy_s - drafted_before[name]) / STEP_S),
            )
            for name, w in pool.items()
        ]  # fmt: skip
        drafted_before = {name: w.total_busy_s for name, w in pool.items()}
        assignments = policy.step(now, reports, drafts)
        for target in targets:
            before, after = target.assignment, assignments.get(target.target_id)
            if before is not None and after is not None:
                changes += (before.worker_id, before.exits, before.cap) != (
                    after.worker_id, after.exits, after.cap)  # fmt: skip
            target.assignment = after
        _check(result, targets, assignments)
        clock.run(min(scenario.duration_s, now + STEP_S))
        progress(clock.now)
    assert marked_at is not None, "a scenario's warm-up ends before its last step"
    seconds = scenario.duration_s - marked_at
    result.tokens_per_s = sum(t.emitted - m[0] for t, m in zip(targets, marks, strict=True)) / seconds
    busy = sum(w.total_busy_s for w in pool.values()) - drafting_at_mark
    result.utilisation = busy / seconds / len(pool) if pool else 0.0
    prepared = sum((t.prepared for t in targets), Counter[str]())
    result.foreseen, result.partly = (
        prepared[kind] / max(1, prepared.total()) for kind in ("foreseen", "partly")
    )
    result.changes_per_target_minute = (changes - changes_at_mark) / len(targets) / (seconds / 60.0)
    by_model: dict[str, list[float]] = {}
    for t, (emitted, busy_s) in zip(targets, marks, strict=True):
        if t.emitted > emitted and t.busy_s > busy_s:
            by_model.setdefault(t.model.size, []).append((t.emitted - emitted) / (t.busy_s - busy_s))
    result.speed_by_model = {model: _geometric(v) for model, v in by_model.items()}
    result.speed = _geometric([x for v in by_model.values() for x in v])
    return result


def _geometric(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else 0.0


def _check(
    result: RunResult, targets: Sequence[SimulatedTarget], assignments: Mapping[str, Assignment]
) -> None:
    """Capacity by the router's own prediction, and the order of depths by the true cost of a round."""
    load: dict[str, float] = {}
    for a in assignments.values():
        if a.worker_id is not None:
            shadow = a.shadow.load if a.shadow is not None else 0.0
            load[a.worker_id] = load.get(a.worker_id, 0.0) + a.load + shadow
    result.highest_plan = max(result.highest_plan, *load.values(), 0.0)
    by_cost: dict[float, list[int]] = {}
    for t in targets:
        if t.target_id in assignments and assignments[t.target_id].cap > 0:
            by_cost.setdefault(t.true_cost_s, []).append(assignments[t.target_id].depth)
    deepest = 0
    for cost in sorted(by_cost):
        result.unsorted += sum(depth < deepest for depth in by_cost[cost])
        deepest = max(deepest, *by_cost[cost])


class RouterPolicy:
    """The router itself; the pool is shared."""

    def __init__(self, router: Router | None = None, *, draft_ahead: bool = False) -> None:
        self.name = "router, draft-ahead" if draft_ahead else "router"
        self.batches = True
        self.draft_ahead = draft_ahead
        self.router = router or Router()

    def workers(self, profile: CostProfile, scenario: Scenario) -> list[str]:
        return pool_names(scenario)

    def step(
        self, now: float, targets: Sequence[TargetReport], drafts: Sequence[DraftReport]
    ) -> dict[str, Assignment]:
        return self.router.step(now, targets, drafts)
