"""Prometheus metrics of the router, through Ray's exporter (see `cluster.telemetry.metrics`)."""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from cluster.router.service import Decision

_MODEL = ("model_name",)


class RouterMetrics:
    """Create it inside the router's process.

    Labelled by model alone: ids of targets and workers are new with each restart, the router outlives them,
    and Ray exports a series for ever. Single targets are in the router's view (GET /admin/router).
    """

    def __init__(self) -> None:
        self._changes = Counter(
            "s2d_router_assignment_changes",
            description="Assignments that changed their worker, exits or cap.",
            tag_keys=_MODEL,
        )
        self._gain = Gauge(
            "s2d_router_predicted_gain",
            description="Predicted speed over plain decoding, the lowest of a model's targets; 1 where "
            "nothing is drafted, 0 for a model that is gone.",
            tag_keys=_MODEL,
        )
        self._cap = Gauge(
            "s2d_router_draft_cap",
            description="Longest draft that is allowed, in tokens, the highest of a model's targets.",
            tag_keys=_MODEL,
        )
        self._load = Gauge(
            "s2d_router_planned_load",
            description="Draft-seconds a second that are planned for a draft worker, the highest of all.",
        )
        self._workers = Gauge("s2d_router_draft_workers", description="Draft workers that report.")
        self._known: dict[str, Decision] = {}

    def record(self, decisions: Mapping[str, Decision], planned_load: Mapping[str, float]) -> None:
        """After a step; by target and by worker."""
        models: dict[str, list[Decision]] = {}
        for target_id, decision in decisions.items():
            models.setdefault(decision.model, []).append(decision)
            before = self._known.get(target_id)
            if before is not None and decision.changed_at > before.changed_at:
                self._changes.inc(1, _tags(decision.model))
        for model, made in models.items():
            self._gain.set(min(d.assignment.gain for d in made), _tags(model))
            self._cap.set(max(d.assignment.cap for d in made), _tags(model))
        for model in {d.model for d in self._known.values()} - models.keys():
            self._gain.set(0.0, _tags(model))
            self._cap.set(0.0, _tags(model))
        self._load.set(max(planned_load.values(), default=0.0))
        self._workers.set(len(planned_load))
        self._known = dict(decisions)


def _tags(model: str) -> dict[str, str]:
    return {"model_name": model}
