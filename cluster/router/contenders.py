"""From reports and memory to what the optimiser compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from actors.costs import CostModel
from cluster.router.evidence import Evidence
from cluster.router.goodput import NO_LATENCY, OFF, Choice, Queue, choices, cost_model, request_counts
from cluster.router.memory import Memory, TargetMemory
from cluster.router.problem import Contender
from cluster.router.reports import DraftReport, Pin, TargetReport
from cluster.router.settings import RouterSettings

_MIN_ACTIVITY = 0.01
_MAX_UTILISATION = 0.9


class ContenderBuilder:
    """Builds the contenders of one step; tables and acceptance curves are made once."""

    def __init__(
        self,
        settings: RouterSettings,
        memory: Memory,
        evidence: Evidence,
        workers: Mapping[str, DraftReport],
    ) -> None:
        self._settings = settings
        self._memory = memory
        self._evidence = evidence
        self._workers = workers
        self._steps: dict[str, dict[int, CostModel]] = {}
        self._curves: dict[tuple[str, tuple[int, ...], int], dict[int, list[float]]] = {}
        self._verify: dict[str, CostModel] = {}

    def build(self, now: float, report: TargetReport, worker_id: str | None) -> Contender:
        known = self._memory.targets[report.target_id]
        pin = self._memory.pins.get(report.target_id, Pin())
        # A target without requests is judged as if it had one, and counts for next to nothing.
        activity = max(_MIN_ACTIVITY, min(1.0, known.running))
        contender = Contender(
            target_id=report.target_id,
            model=report.model,
            worker_id=worker_id,
            cost_s=known.cost_s,
            requests=max(1, round(known.running)),
            weight=report.weight * activity,
            pin=pin,
            drafts_itself=report.holds_draft,
        )
        if worker_id is not None and (pin.exits is not None or not report.holds_draft):
            self._fill(contender, report, self._workers[worker_id], activity)
        if known.decided:
            contender.held = self._held(contender, known)
            contender.may_change = now - known.since >= self._settings.dwell_s
        return contender

    def _held(self, c: Contender, known: TargetMemory) -> Choice | None:
        """The present choice with today's figures. One that no longer pays counts as not drafting: where
        other drafters share the worker, it would stand in their way."""
        held = c.same(known.exit, known.length)
        if held is not None and held.gain < self._settings.keep_draft_gain and not c.must_draft:
            return OFF
        return held

    def _fill(self, c: Contender, report: TargetReport, worker: DraftReport, activity: float) -> None:
        exits = worker.exits
        curves = self._acceptance(report.model, exits, report.max_draft)
        remembered = self._memory.workers[worker.worker_id]
        known = self._memory.targets[report.target_id]
        drafts_there = known.worker_id == worker.worker_id and known.length > 0
        own = report.weight * known.rounds_per_s if drafts_there else 0.0
        latency_s = report.latency_s.get(worker.worker_id, NO_LATENCY)
        queue = Queue(
            remembered.wait_s,
            min(_MAX_UTILISATION, remembered.utilisation),
            max(0.0, remembered.pressure - own),
            remembered.load_scale,
        )
        if c.drafts_itself:
            latency_s, queue = 0.0, Queue()
        steps = self._steps.setdefault(
            worker.worker_id, {d: cost_model(t) for d, t in worker.step_s_by_exit.items()}
        )
        verify = self._verify.get(report.target_id)
        if verify is None:
            verify = self._verify[report.target_id] = cost_model(report.cost_s_by_rows)
        for depth in exits:
            if c.pin.exits is not None and depth not in c.pin.exits:
                continue
            table = choices(
                requests=request_counts(known.running),
                activity=activity,
                weight=c.weight,
                verify=verify,
                step=steps[depth],
                exit_depth=depth,
                acceptance=curves[depth],
                latency_s=latency_s,
                queue=queue,
            )
            if c.pin.cap is not None:
                table = [x for x in table if x.length == min(c.pin.cap, report.max_draft)]
            if c.drafts_itself:
                table = [replace(x, load=0.0) for x in table]
            if table:
                c.table[depth] = table

    def _acceptance(self, model: str, exits: tuple[int, ...], length: int) -> dict[int, list[float]]:
        key = (model, exits, length)
        if key not in self._curves:
            self._curves[key] = self._evidence.curves(model, exits, length)
        return self._curves[key]

    def wished(self, c: Contender) -> Choice:
        """What the target would take if it were alone."""
        options = [x for d in c.table if (x := c.best(d, self._settings.min_draft_gain)) is not None]
        return max(options, key=lambda x: (x.value, -x.exit), default=OFF)

    def wished_depth(self, c: Contender) -> int:
        return self.wished(c).exit

    def wished_load(self, c: Contender) -> float:
        return self.wished(c).load
