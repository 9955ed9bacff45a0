"""What the router is compared with, on the same hardware and with the same controller in every target."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.router.goodput import Queue, choices, cost_model
from cluster.router.reports import Assignment, DraftReport, TargetReport
from cluster.simulator.profile import CostProfile
from cluster.simulator.scenario import ModelTraits, Scenario, models_of, pool_names


class NoSpeculation:
    name = "no speculation"
    batches = True
    draft_ahead = False

    def workers(self, profile: CostProfile, scenario: Scenario) -> list[str]:
        return []

    def step(
        self, now: float, targets: Sequence[TargetReport], drafts: Sequence[DraftReport]
    ) -> dict[str, Assignment]:
        return {}


class FixedExit:
    """One draft without nesting for all targets: exit and length fixed, workers shared evenly."""

    batches = True
    draft_ahead = False

    def __init__(self, exit_depth: int, length: int) -> None:
        self.name = f"fixed exit {exit_depth}, length {length}"
        self._exit, self._length = exit_depth, length

    def workers(self, profile: CostProfile, scenario: Scenario) -> list[str]:
        return pool_names(scenario)

    def step(
        self, now: float, targets: Sequence[TargetReport], drafts: Sequence[DraftReport]
    ) -> dict[str, Assignment]:
        ids = sorted(d.worker_id for d in drafts)
        return {
            t.target_id: Assignment(t.target_id, ids[i % len(ids)], (self._exit,), self._length, "fixed")
            for i, t in enumerate(targets)
        }


class DraftPerModel:
    """A draft of its own for each model, as vLLM and SGLang have it, on the same workers: rounds of different
    models cannot share a batch and take turns. Each has the exit and length that are best for it when nobody
    else drafts, by its true acceptance, at two requests: more than anybody knows in advance."""

    name = "one draft per model"
    batches = False
    draft_ahead = False

    def __init__(self) -> None:
        self._choice: dict[str, tuple[int, int]] = {}

    def workers(self, profile: CostProfile, scenario: Scenario) -> list[str]:
        for model in models_of(profile, scenario):
            if model.name not in self._choice:
                self._choice[model.name] = _best(profile, scenario, model)
        return pool_names(scenario)

    def step(
        self, now: float, targets: Sequence[TargetReport], drafts: Sequence[DraftReport]
    ) -> dict[str, Assignment]:
        ids = sorted(d.worker_id for d in drafts)
        result = {}
        for i, t in enumerate(targets):
            exit_depth, length = self._choice[t.model]
            result[t.target_id] = Assignment(
                t.target_id, ids[i % len(ids)], (exit_depth,), length, "own draft"
            )
        return result


def _best(profile: CostProfile, scenario: Scenario, model: ModelTraits) -> tuple[int, int]:
    """(exit, length) of the greatest goodput on an idle worker."""
    options = []
    for depth, table in profile.draft_s.items():
        mean = sum(rates[depth] for rates in model.rates.values()) / len(model.rates)
        rate = scenario.favourite * model.rates[model.favourite][depth] + (1 - scenario.favourite) * mean
        options += choices(
            requests=(2,), activity=1.0, weight=1.0, verify=cost_model(profile.verify_s(model.size)),
            step=cost_model(table), exit_depth=depth,
            acceptance=[rate * profile.acceptance_decay**place for place in range(scenario.max_draft)],
            latency_s=profile.latency_ms / 1e3, queue=Queue(),
        )  # fmt: skip
    best = max(options, key=lambda c: c.gain)
    return best.exit, best.length
