"""What the router remembers from step to step, as data that a restarted router can take over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.router.reports import Pin


@dataclass(slots=True)
class TargetMemory:
    """`running` and `rounds_per_s` are smoothed, `cost_s` is sticky; (worker, exit, length) is the choice
    that is held, since `since` (seconds on the router's clock); `moved_at`: when it last changed its
    worker."""

    running: float
    cost_s: float
    rounds_per_s: float = 0.0
    worker_id: str | None = None
    exit: int = 0
    length: int = 0
    since: float = float("-inf")
    moved_at: float = float("-inf")
    decided: bool = False
    reason: str = ""


@dataclass(slots=True)
class WorkerMemory:
    """Smoothed figures, see `cluster.router.goodput.Queue`; `load_scale` is below 1, since targets that draft
    at once share steps. `shadow_load`: planned by the last step, in draft-seconds a second."""

    utilisation: float = 0.0
    load_scale: float = 1.0
    wait_s: float = 0.0
    pressure: float = 0.0
    shadow_load: float = 0.0


@dataclass(slots=True)
class Memory:
    targets: dict[str, TargetMemory] = field(default_factory=dict)
    workers: dict[str, WorkerMemory] = field(default_factory=dict)
    pins: dict[str, Pin] = field(default_factory=dict)
    changes: int = 0

    def export(self) -> dict[str, Any]:
        """JSON-able: infinite times become null."""

        def plain(item: TargetMemory) -> dict[str, Any]:
            data = asdict(item)
            for key in ("since", "moved_at"):
                data[key] = None if data[key] == float("-inf") else data[key]
            return data

        return {
            "targets": {k: plain(v) for k, v in self.targets.items()},
            "workers": {k: asdict(v) for k, v in self.workers.items()},
            "pins": {k: asdict(v) for k, v in self.pins.items()},
            "changes": self.changes,
        }

    @classmethod
    def restored(cls, data: Mapping[str, Any]) -> Memory:
        def target(item: Mapping[str, Any]) -> TargetMemory:
            times = {key: float("-inf") if item[key] is None else item[key] for key in ("since", "moved_at")}
            return TargetMemory(**(dict(item) | times))

        def pin(item: Mapping[str, Any]) -> Pin:
            exits = item["exits"]
            return Pin(item["worker_id"], None if exits is None else tuple(exits), item["cap"])

        return cls(
            {k: target(v) for k, v in data["targets"].items()},
            {k: WorkerMemory(**v) for k, v in data["workers"].items()},
            {k: pin(v) for k, v in data["pins"].items()},
            data["changes"],
        )
