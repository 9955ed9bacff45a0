"""The sorted multi-target router: who drafts for whom, at which exit, how many tokens. Pure logic, no Ray.

A step (about one a second): take in reports; place targets on draft workers; find the best sorted plan and
the plan that changes as little as the limits allow; take the first only where it promises enough over the
second; explain each choice. docs/methods/router.md has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from actors.costs import CostModel
from cluster.router import reasons
from cluster.router.contenders import ContenderBuilder
from cluster.router.evidence import Evidence
from cluster.router.goodput import Choice, cost_model
from cluster.router.memory import Memory, TargetMemory, WorkerMemory
from cluster.router.placement import place, rebalance
from cluster.router.problem import Contender, Plan, is_sorted
from cluster.router.reports import Assignment, DraftReport, DraftService, Pin, ShadowScoring, TargetReport
from cluster.router.settings import RouterSettings
from cluster.router.shadow import plan_shadows
from cluster.router.shedding import Shed, shed
from cluster.router.sorted_depths import sorted_plan

STATE_VERSION = 1
_MIN_SCALE, _MAX_SCALE = 0.1, 2.0
_SCALE_SMOOTHING = 0.1


class Router:
    """Call `step` about once a second from one thread. `now` is any clock in seconds that never goes back; a
    restored router must be given the same one (time.time())."""

    def __init__(self, settings: RouterSettings | None = None) -> None:
        self.settings = settings or RouterSettings()
        self._memory = Memory()
        self._evidence = Evidence(self.settings.shadow_age_s)

    def pin(self, target_id: str, pin: Pin | None) -> None:
        """Fix parts of a target's assignment, from the next step on; None gives it back to the router."""
        known = self._memory.targets.get(target_id)
        if known is not None and pin != self._memory.pins.get(target_id):
            known.since = float("-inf")  # what was chosen under another pin need not stay
        if pin is None:
            self._memory.pins.pop(target_id, None)
        else:
            self._memory.pins[target_id] = pin

    @property
    def pins(self) -> dict[str, Pin]:
        return dict(self._memory.pins)

    @property
    def changes(self) -> int:
        """Assignments that differ from the step before, over all steps; a first one does not count."""
        return self._memory.changes

    def step(
        self, now: float, targets: Sequence[TargetReport], drafts: Sequence[DraftReport]
    ) -> dict[str, Assignment]:
        """An assignment for each reported target. Raises ValueError when an id is reported twice."""
        reports = {t.target_id: t for t in targets}
        workers = {d.worker_id: d for d in drafts}
        if len(reports) != len(targets) or len(workers) != len(drafts):
            raise ValueError("each target and each draft worker may report once")
        self._take_in(now, reports, workers)
        builder = ContenderBuilder(self.settings, self._memory, self._evidence, workers)
        contenders = self._place(now, reports, workers, builder)
        contenders.sort(key=lambda c: (c.cost_s, builder.wished_depth(c), c.target_id))
        shared = [c for c in contenders if not c.drafts_itself]
        plan, given_up = self._decide(shared, workers)
        for c in contenders:
            if c.drafts_itself:  # it takes nothing from the others, and their order does not bind it
                plan |= self._decide([c], {})[0]
        rounds = {t: self._memory.targets[t].rounds_per_s for t in reports}
        shadows = plan_shadows(shared, plan, reports, rounds, workers, self._evidence, self.settings)
        for worker_id, known in self._memory.workers.items():
            mine = (shadows.get(c.target_id) for c in shared if c.worker_id == worker_id)
            known.shadow_load = sum(shadow.load for shadow in mine if shadow is not None)
        return {
            c.target_id: self._assign(now, c, plan[c.target_id], given_up, shadows.get(c.target_id))
            for c in contenders
        }

    # What the reports say.

    def _take_in(
        self, now: float, reports: Mapping[str, TargetReport], workers: Mapping[str, DraftReport]
    ) -> None:
        s, memory = self.settings, self._memory
        self._evidence.update(now, reports.values())
        memory.targets = {k: v for k, v in memory.targets.items() if k in reports}
        memory.workers = {k: v for k, v in memory.workers.items() if k in workers}
        for report in reports.values():
            cost = report.cost_s_by_rows[min(report.cost_s_by_rows)]
            known = memory.targets.get(report.target_id)
            if known is None:
                memory.targets[report.target_id] = TargetMemory(
                    float(report.running), cost, report.rounds_per_s
                )
                continue
            known.running += s.smoothing * (report.running - known.running)
            known.rounds_per_s += s.smoothing * (report.rounds_per_s - known.rounds_per_s)
            if abs(cost / known.cost_s - 1.0) > s.cost_tolerance:
                known.cost_s = cost
        for worker in workers.values():
            known_worker = memory.workers.setdefault(
                worker.worker_id, WorkerMemory(min(1.0, worker.utilisation))
            )
            used = min(1.0, worker.utilisation)
            known_worker.utilisation += s.smoothing * (used - known_worker.utilisation)
            self._take_in_queue(worker, known_worker, reports)

    def _take_in_queue(
        self, worker: DraftReport, known: WorkerMemory, reports: Mapping[str, TargetReport]
    ) -> None:
        """Compares what the worker's targets say with what one alone would see."""
        predicted = waited = rounds = pressure = 0.0
        for report in reports.values():
            target = self._memory.targets[report.target_id]
            table = worker.step_s_by_exit.get(target.exit)
            if report.holds_draft or target.worker_id != worker.worker_id:
                continue
            if table is None or target.length == 0:
                continue
            requests = max(1, round(target.running))
            step = cost_model(table)
            predicted += report.draft_tokens_per_s / requests * step.seconds(requests)
            pressure += report.weight * report.rounds_per_s
            service = report.service
            waited += service.rounds_per_s * max(0.0, service.seconds - _alone_s(service, step))
            rounds += service.rounds_per_s
        s = self.settings
        if predicted > 0.01:
            predicted += known.shadow_load  # the worker is busy with that, too
            ratio = min(_MAX_SCALE, max(_MIN_SCALE, min(1.0, worker.utilisation) / predicted))
            known.load_scale += _SCALE_SMOOTHING * (ratio - known.load_scale)
        known.pressure += s.smoothing * (pressure - known.pressure)
        known.wait_s += s.smoothing * ((waited / rounds if rounds else 0.0) - known.wait_s)

    # Which worker.

    def _place(
        self,
        now: float,
        reports: Mapping[str, TargetReport],
        workers: Mapping[str, DraftReport],
        builder: ContenderBuilder,
    ) -> list[Contender]:
        memory, s = self._memory, self.settings
        ids = sorted(workers)
        held = {k: v.worker_id for k, v in memory.targets.items() if v.worker_id is not None}
        pinned = {k: p.worker_id for k, p in memory.pins.items() if p.worker_id is not None}
        # Demand is judged where a target is, or where it would be judged first.
        start = {t: w for t in reports if (w := held.get(t)) in workers} if workers else {}
        first = {t: start.get(t, ids[0] if ids else None) for t in reports}
        contenders = {t: builder.build(now, reports[t], first[t]) for t in reports}
        demand = {t: builder.wished_load(c) for t, c in contenders.items()}
        placed = place(sorted(reports), ids, held, pinned, demand)
        movable = [
            t
            for t in sorted(placed)
            if t not in pinned and t in held and now - memory.targets[t].moved_at >= s.dwell_s
        ]
        move = rebalance(placed, ids, movable, demand, s.move_gap)
        if move is not None:
            placed[move[0]] = move[1]
        for target, worker in placed.items():
            if worker != first[target]:
                contenders[target] = builder.build(now, reports[target], worker)
        return list(contenders.values())

    # Which exit and length.

    def _decide(self, order: list[Contender], workers: Mapping[str, DraftReport]) -> tuple[Plan, Shed]:
        """The best plan where it promises enough over keeping what is, else what is."""
        s = self.settings
        change_cost = math.log(s.min_change_gain)
        limit, full = dict.fromkeys(workers, s.limit), dict.fromkeys(workers, s.plan)
        sessions = {w: d.max_sessions for w, d in workers.items()}
        kept = sorted_plan(order, s.min_draft_gain, change_cost, hold=True)
        kept_shed = shed(order, kept, limit, full, sessions, s.min_draft_gain)
        best = sorted_plan(order, s.min_draft_gain, change_cost)
        best_shed = shed(order, best, full, full, sessions, s.min_draft_gain)
        gain = sum(best[c.target_id].value - kept[c.target_id].value for c in order)
        moved = sum(
            c.weight
            for c in order
            if (best[c.target_id].exit, best[c.target_id].length)
            != (kept[c.target_id].exit, kept[c.target_id].length)
        )
        if moved > 0.0 and gain >= change_cost * moved:
            plan, given_up = best, best_shed
        else:
            plan, given_up = kept, kept_shed
        assert is_sorted(order, plan)
        return plan, given_up

    # What is said about it.

    def _assign(
        self,
        now: float,
        c: Contender,
        choice: Choice,
        given_up: Shed,
        shadow: ShadowScoring | None,
    ) -> Assignment:
        memory = self._memory.targets[c.target_id]
        served = c.worker_id is not None
        changed = served and (memory.exit, memory.length) != (choice.exit, choice.length)
        moved = memory.worker_id != c.worker_id
        if memory.decided and (changed or moved):
            self._memory.changes += 1
        # A first decision rests on little and may be followed by a better one at once.
        if changed and memory.decided:
            memory.since = now
        if moved:
            memory.moved_at = now
        reason = reasons.explain(c, choice, given_up, memory, changed, moved, self.settings)
        memory.worker_id, memory.reason = c.worker_id, reason
        if served:  # else what was chosen waits for a worker's return
            memory.exit, memory.length, memory.decided = choice.exit, choice.length, True
        exits: tuple[int, ...] = (choice.exit,) if choice.length > 0 else ()
        cap = choice.length
        if c.drafts_itself or not served:  # what an operator fixed holds for a target's own copy of the draft
            exits, cap = exits or c.pin.exits or (), c.pin.cap or 0
        return Assignment(
            target_id=c.target_id,
            worker_id=c.worker_id,
            exits=exits,
            cap=cap,
            reason=reason,
            gain=choice.gain,
            load=choice.load,
            shadow=shadow,
            cap_pinned=c.pin.cap is not None,
            exits_pinned=c.pin.exits is not None,
        )

    # State.

    def export_state(self) -> dict[str, Any]:
        """All that the next decision depends on, JSON-able."""
        return {
            "version": STATE_VERSION,
            "memory": self._memory.export(),
            "evidence": self._evidence.export(),
        }

    @classmethod
    def restore(cls, state: Mapping[str, Any], settings: RouterSettings | None = None) -> Router:
        """A router that goes on where the exported one stopped, with today's settings. Raises ValueError for
        another version."""
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"router state has version {state.get('version')}, need {STATE_VERSION}")
        router = cls(settings)
        router._memory = Memory.restored(state["memory"])
        router._evidence.restore(state["evidence"])
        return router


def _alone_s(service: DraftService, step: CostModel) -> float:
    """Seconds that the nested drafts of a round take where nobody else drafts."""
    if service.steps <= 0.0:
        return 0.0
    sessions = service.tokens / service.steps
    whole = math.floor(sessions)
    seconds = step.seconds(whole)
    return service.steps * (seconds + (sessions - whole) * (step.seconds(whole + 1) - seconds))
