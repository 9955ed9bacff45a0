"""What a choice of exit and cap is worth to a target, and what it costs the pool.

With R requests, cap m and exit n, acceptance a_i, verification cost C and draft step D_n, the controller
(`actors.engine.controller`) asks for m tokens and verifies the k <= m of them that pay, or does not ask:
    goodput(R) = max over k of R (1 + sum_{j<=k} prod_{i<=j} a_i) / (latency + m D_n(R) (1 + u/2) + C(R (1 + k)))
u is the worker's utilisation: a round finds it busy with probability u and then waits for half a batch, taken to
be as long as its own. R varies from round to round, so that the mean over a few R around the reported one counts.
The value is the mean of log(goodput / plain goodput): a target counts by its relative gain, and none is starved
for another with cheaper tokens.
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
    """`length` is the cap. `gain` over plain decoding; `value` is its logarithm times the target's weight; `load`
    in draft-seconds a second."""

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


def request_counts(mean: float) -> tuple[int, ...]:
    """Numbers of requests that stand for a target that runs `mean` of them: half, all, and half as many more."""
    return tuple(max(1, round(mean * factor)) for factor in (0.5, 1.0, 1.5))


def choices(
    *,
    requests: Sequence[int],
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
    """One choice for each cap 1..len(acceptance). `activity` is the share of the time with requests."""
    expected = [1.0]
    survival = 1.0
    for rate in acceptance:
        survival *= rate
        expected.append(expected[-1] + survival)
    result = []
    for cap in range(1, len(expected)):
        value = load = 0.0
        for running in requests:
            gain, used = _best(running, cap, expected, verify, step, latency_s, utilisation)
            value += math.log(gain) / len(requests)
            load += used / len(requests)
        result.append(Choice(exit_depth, cap, math.exp(value), weight * value, activity * load_scale * load))
    return result


def _best(
    running: int,
    cap: int,
    expected: Sequence[float],
    verify: CostModel,
    step: CostModel,
    latency_s: float,
    utilisation: float,
) -> tuple[float, float]:
    """(gain, draft-seconds a second) of what the controller would do with `running` requests: not drafting is
    (1, 0), unless drafting pays."""
    plain = verify.seconds(running)
    drafting = cap * step.seconds(running)
    before = latency_s + drafting * (1.0 + utilisation / 2)
    gain, seconds = max(
        (expected[k] * plain / (total := before + verify.seconds(running * (1 + k))), total)
        for k in range(1, cap + 1)
    )
    return (gain, drafting / seconds) if gain > 1.0 else (1.0, 0.0)
