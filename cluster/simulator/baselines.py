"""What the router is compared with, on the same hardware and with the same controller in every target."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.router.goodput import Queue, choices, cost_model
from cluster.router.reports import Assignment, DraftReport, TargetReport
from cluster.simulator.profile import CostProfile
from cluster.simulator.scenario import Scenario


class NoSpeculation:
    name = "no speculation"

    def workers(self, profile: CostProfile, scenario: Scenario) -> list[tuple[str, float]]:
        return []

    def step(
        self, now: float, targets: Sequence[TargetReport], drafts: Sequence[DraftReport]
    ) -> dict[str, Assignment]:
        return {}


class FixedExit:
    """One draft without nesting for all targets: exit and length fixed, workers shared evenly."""

    def __init__(self, exit_depth: int, length: int) -> None:
        self.name = f"fixed exit {exit_depth}, length {length}"
        self._exit, self._length = exit_depth, length

    def workers(self, profile: CostProfile, scenario: Scenario) -> list[tuple[str, float]]:
        return [(f"d{i}", 1.0) for i in range(scenario.draft_workers)]

    def step(
        self, now: float, targets: Sequence[TargetReport], drafts: Sequence[DraftReport]
    ) -> dict[str, Assignment]:
        ids = sorted(d.worker_id for d in drafts)
        return {
            t.target_id: Assignment(t.target_id, ids[i % len(ids)], (self._exit,), self._length, "fixed")
            for i, t in enumerate(targets)
        }


class DraftPerSize:
    """A draft of its own for each size of target, as vLLM and SGLang have one for each target: the pool is
    cut into equal shares, and each has the exit and length that is best on its share, by the true mean
    acceptance, at two requests. Generous: a draft for each model would leave a model a fifteenth of that
    share."""

    name = "one draft per target size"

    def __init__(self, profile: CostProfile) -> None:
        self._profile = profile
        self._choice: dict[str, tuple[int, int]] = {}

    def workers(self, profile: CostProfile, scenario: Scenario) -> list[tuple[str, float]]:
        slowness = len(profile.models) / scenario.draft_workers
        for model in profile.models:
            self._choice[model] = self._best(model, slowness, scenario.max_draft)
        return [(model, slowness) for model in profile.models]

    def _best(self, model: str, slowness: float, longest: int) -> tuple[int, int]:
        options = []
        tasks = list(self._profile.acceptance)
        for depth, table in self._profile.draft_s.items():
            rate = sum(self._profile.acceptance[task][depth] for task in tasks) / len(tasks)
            rate *= self._profile.models[model].acceptance
            rates = [rate * self._profile.acceptance_decay**place for place in range(longest)]
            options += choices(
                requests=(2,), activity=1.0, weight=1.0,
                verify=cost_model(self._profile.verify_s(model)),
                step=cost_model({n: s * slowness for n, s in table.items()}),
                exit_depth=depth, acceptance=rates, latency_s=self._profile.latency_ms / 1e3,
                queue=Queue(),
            )  # fmt: skip
        best = max(options, key=lambda c: c.gain)
        return best.exit, best.length

    def step(
        self, now: float, targets: Sequence[TargetReport], drafts: Sequence[DraftReport]
    ) -> dict[str, Assignment]:
        result = {}
        for t in targets:
            exit_depth, length = self._choice[t.model.partition("/")[0]]
            result[t.target_id] = Assignment(
                t.target_id, t.model.partition("/")[0], (exit_depth,), length, "own draft"
            )
        return result
