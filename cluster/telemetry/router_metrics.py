"""Prometheus metrics of the router, through Ray's exporter (see `cluster.telemetry.metrics`)."""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from cluster.router.service import Decision

_TARGET = ("model_name", "target")


class RouterMetrics:
    """Create it inside the router's process."""

    def __init__(self) -> None:
        self._changes = Counter(
            "s2d_router_assignment_changes",
            description="Assignments that changed their worker, exits or cap.",
            tag_keys=_TARGET,
        )
        self._gain = Gauge(
            "s2d_router_predicted_gain",
            description="Predicted speed over plain decoding; 1 where nothing is drafted.",
            tag_keys=_TARGET,
        )
        self._cap = Gauge(
            "s2d_router_draft_cap", description="Longest draft that is allowed, in tokens.", tag_keys=_TARGET
        )
        self._load = Gauge(
            "s2d_router_planned_load",
            description="Draft-seconds a second that are planned for a draft worker.",
            tag_keys=("worker",),
        )
        self._known: dict[str, Decision] = {}
        self._workers: set[str] = set()

    def record(self, decisions: Mapping[str, Decision], planned_load: Mapping[str, float]) -> None:
        """After a step. What is gone is set to zero, since Ray keeps its last value for ever."""
        for target_id, decision in decisions.items():
            tags = _tags(target_id, decision)
            before = self._known.get(target_id)
            if before is not None and decision.changed_at > before.changed_at:
                self._changes.inc(1, tags)
            self._gain.set(decision.assignment.gain, tags)
            self._cap.set(decision.assignment.cap, tags)
        for target_id in self._known.keys() - decisions.keys():
            tags = _tags(target_id, self._known[target_id])
            self._gain.set(0.0, tags)
            self._cap.set(0.0, tags)
        for worker in self._workers - planned_load.keys():
            self._load.set(0.0, {"worker": worker})
        for worker, load in planned_load.items():
            self._load.set(load, {"worker": worker})
        self._known, self._workers = dict(decisions), set(planned_load)


def _tags(target_id: str, decision: Decision) -> dict[str, str]:
    return {"model_name": decision.model, "target": target_id}
