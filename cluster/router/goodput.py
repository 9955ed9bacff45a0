"""What a choice of exit and length is worth to a target, and what it costs the pool.

With R requests, draft length k at exit n, acceptance a_i, verification cost C and draft step D_n:
    goodput = R (1 + sum_j prod_{i<=j} a_i) / (latency + k D_n(R) (1 + u/2) + C(R (1 + k)))
as in `actors.engine.controller`; u is the worker's utilisation: a round finds it busy with probability u and
then waits for half a batch, taken to be as long as its own. The value is log(goodput / plain goodput), so that
a target counts by its relative gain and none is starved for another with cheaper tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.engine.costs import CostModel

NO_LATENCY = 1e-3
"""Seconds of a round trip that nobody measured yet."""


@dataclass(frozen=True, slots=True)
class Choice:
    """`gain` over plain decoding; `value` is its logarithm times the target's weight; `load` in draft-seconds a
    second."""

    exit: int
    length: int
    gain: float
    value: float
    load: float


OFF = Choice(0, 0, 1.0, 0.0, 0.0)


def cost_model(seconds_by_count: Mapping[int, float]) -> CostModel:
    """The engine's interpolation over a reported table."""
    model = CostModel()
    for count, seconds in sorted(seconds_by_count.items()):
        model.observe(int(count), seconds)
    return model


def choices(
    *,
    requests: int,
    activity: float,
    weight: float,
    verify: CostModel,
    step: CostModel,
    exit_depth: int,
    acceptance: Sequence[float],
    latency_s: float,
    utilisation: float,
    load_scale: float,
) -> list[Choice]:
    """One choice for each length 1..len(acceptance). `activity` is the share of the time with requests."""
    plain = verify.seconds(requests)
    step_s = step.seconds(requests)
    expected, survival = 1.0, 1.0
    result = []
    for length, rate in enumerate(acceptance, start=1):
        survival *= rate
        expected += survival
        drafting = length * step_s
        seconds = latency_s + drafting * (1.0 + utilisation / 2) + verify.seconds(requests * (1 + length))
        gain = expected * plain / seconds
        result.append(
            Choice(
                exit_depth,
                length,
                gain,
                weight * math.log(gain),
                activity * load_scale * drafting / seconds,
            )
        )
    return result
