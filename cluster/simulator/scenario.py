"""What is simulated: which targets there are, what they are asked for, and the pool."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.simulator.profile import CostProfile

STEP_S = 1.0
"""Simulated seconds from one of a policy's decisions to the next."""


class Scenario(BaseModel):
    """Targets are replicas of models; a model has a size of the profile, a quality (how well the draft fits
    it) and a favourite task. Sessions arrive as Poisson processes; their numbers of tokens are
    exponential."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    targets: int = Field(200, ge=1, description="Target workers.")
    replicas: int = Field(2, ge=1, description="Target workers a model.")
    draft_workers: int = Field(4, ge=1, description="Workers of the shared draft pool.")
    load: float = Field(
        1.5,
        gt=0,
        description="Mean sessions at once that a target would have at the speed of one, undrafted.",
    )
    load_spread: float = Field(0.5, ge=0, lt=1, description="Targets differ in load by up to this share.")
    quality: tuple[float, float] = Field((0.75, 1.05), description="Range of the factor on acceptance.")
    favourite: float = Field(0.7, ge=0, le=1, description="Share of the sessions with the favourite task.")
    tokens: float = Field(40.0, ge=1, description="Mean tokens of an answer.")
    max_running: int = Field(8, ge=1, description="Requests that a target runs at once.")
    duration_s: float = Field(75.0, gt=0, description="Simulated seconds.")
    warmup_s: float = Field(25.0, ge=0, description="Seconds at the start that do not count.")
    max_draft: int = Field(6, ge=1, le=16, description="Draft tokens a round, at most.")
    noise: float = Field(0.05, ge=0, lt=1, description="Standard deviation of a round's time, as a share.")
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _something_counts(self) -> Scenario:
        if self.warmup_s >= self.duration_s:
            raise ValueError("warmup_s: must be less than duration_s")
        if self.warmup_s > (last := self.step_times[-1]):
            raise ValueError(f"warmup_s: must end by the last decision, at {last:g} s")
        if not 0 < self.quality[0] <= self.quality[1]:
            raise ValueError("quality: needs two positive factors, the smaller one first")
        return self

    @property
    def step_times(self) -> list[float]:
        """When decisions are made, in simulated seconds."""
        return [number * STEP_S for number in range(math.ceil(self.duration_s / STEP_S))]


@dataclass(frozen=True, slots=True)
class ModelTraits:
    """name: unique. size: a model of the profile. rates[task][exit]: P(first token accepted)."""

    name: str
    size: str
    rates: dict[str, dict[int, float]]
    favourite: str


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    target: int
    task: str
    tokens: int


def pool_names(scenario: Scenario) -> list[str]:
    """Ids of the draft workers."""
    return [f"d{i}" for i in range(scenario.draft_workers)]


def models_of(profile: CostProfile, scenario: Scenario) -> list[ModelTraits]:
    """One for each target; replicas share theirs."""
    rng = random.Random(f"{scenario.seed}/models")
    sizes, tasks = list(profile.models), sorted(profile.acceptance)
    result: list[ModelTraits] = []
    while len(result) < scenario.targets:
        number = len(result) // scenario.replicas
        size = sizes[number % len(sizes)]
        quality = rng.uniform(*scenario.quality) * profile.models[size].acceptance
        rates = {
            task: {depth: min(0.95, rate * quality) for depth, rate in profile.acceptance[task].items()}
            for task in tasks
        }
        result += [ModelTraits(f"{size}/{number}", size, rates, rng.choice(tasks))] * scenario.replicas
    return result[: scenario.targets]


def arrivals(profile: CostProfile, scenario: Scenario, models: Sequence[ModelTraits]) -> list[Arrival]:
    """All sessions, in order of time. The same for every policy."""
    result = []
    tasks = sorted(profile.acceptance)
    for index, model in enumerate(models):
        rng = random.Random(f"{scenario.seed}/arrivals/{index}")
        speed = 1.0 / profile.verify_s(model.size)[min(profile.verify_s(model.size))]
        spread = rng.uniform(1.0 - scenario.load_spread, 1.0 + scenario.load_spread)
        rate = scenario.load * spread * speed / scenario.tokens
        at = rng.expovariate(rate)
        while at < scenario.duration_s:
            task = model.favourite if rng.random() < scenario.favourite else rng.choice(tasks)
            result.append(Arrival(at, index, task, 1 + int(rng.expovariate(1.0 / scenario.tokens))))
            at += rng.expovariate(rate)
    return sorted(result, key=lambda a: (a.at_s, a.target))
