"""What a choice of exit and cap is worth to a target, and what it costs the pool.

With R requests, cap m and exit n, acceptance a_i, verification cost C and draft step D_n, the controller
(`actors.engine.controller`) asks for m tokens and verifies the k <= m of them that pay, or does not ask:
    goodput(R) = max over k of R (1 + sum_{j<=k} prod_{i<=j} a_i) / (latency + W + m D_n(R) + C(R (1 + k)))
W is the measured mean wait at the draft worker. R varies from round to round, so that the mean over a few R
around the reported one counts. A draft also makes others wait: by the formula of Pollaczek and Khinchine,
jobs of s seconds that take the load l of a worker of utilisation u add l (s + 2 W) / (2 (1 - u)) seconds to
the mean wait of everybody there, and a second more costs a target its rounds a second, relatively. So
    value = weight mean log(goodput / plain goodput) - l (s + 2 W) / (2 (1 - u)) K,
K the sum of weight times rounds a second over the other targets that draft there: a target, which drafts once
a round for all its requests, never waits for itself.
A target counts by its relative gain, and none is starved for another with cheaper tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.costs import CostModel

NO_LATENCY = 1e-3
"""Seconds of a round trip that nobody measured yet."""


@dataclass(frozen=True, slots=True)
class Choice:
    """`length` is the cap. `gain` over plain decoding; `value` is its logarithm times the target's weight;
    `load` in draft-seconds a second."""

    exit: int
    length: int
    gain: float
    value: float
    load: float


OFF = Choice(0, 0, 1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Queue:
    """A draft worker as it is now, for one target. wait_s: mean seconds that a round takes there beyond its
    own draft steps. utilisation: below 1. pressure: sum of weight times rounds a second of the others who
    wait there. load_scale: measured over predicted load, below 1 where rounds share steps."""

    wait_s: float = 0.0
    utilisation: float = 0.0
    pressure: float = 0.0
    load_scale: float = 1.0

    def price(self, load: float, job_s: float) -> float:
        """What jobs of `job_s` seconds cost the others, in value."""
        return load * (job_s + 2.0 * self.wait_s) / (2.0 * (1.0 - self.utilisation)) * self.pressure


def cost_model(seconds_by_count: Mapping[int, float]) -> CostModel:
    """The engine's interpolation over a reported table."""
    model = CostModel()
    for count, seconds in sorted(seconds_by_count.items()):
        model.observe(int(count), seconds)
    return model


def request_counts(mean: float) -> tuple[int, ...]:
    """Numbers of requests that stand for a target that runs `mean` of them: half, all, and half as many
    more."""
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
    queue: Queue,
) -> list[Choice]:
    """One choice for each cap 1..len(acceptance). `activity` is the share of the time with requests."""
    expected = [1.0]
    survival = 1.0
    for rate in acceptance:
        survival *= rate
        expected.append(expected[-1] + survival)
    rounds = [
        (n == 1, step.seconds(n), [verify.seconds(n * (1 + k)) for k in range(len(expected))])
        for n in requests
    ]
    result = []
    for cap in range(1, len(expected)):
        logs = load = price = 0.0
        for alone, step_s, verify_s in rounds:
            gain, round_s, asked = _best(alone, cap, expected, verify_s, latency_s + queue.wait_s, step_s)
            logs += math.log(gain) / len(requests)
            if round_s > 0.0:
                job_s = asked * step_s
                used = activity * queue.load_scale * job_s / round_s / len(requests)
                load += used
                price += queue.price(used, job_s)
        result.append(Choice(exit_depth, cap, math.exp(logs), weight * logs - price, load))
    return result


def _best(
    alone: bool, cap: int, expected: Sequence[float], verify_s: Sequence[float], wait_s: float, step_s: float
) -> tuple[float, float, int]:
    """(gain, seconds of the round, tokens asked for) of what the controller would do with requests that wait
    so long before they are drafted for, and whose rounds take `verify_s` by tokens drafted for each;
    (1, 0, 0) where it would not draft. A request that is alone asks for all it may have, those of a batch for
    what they verify."""
    best = (1.0, 0.0, 0)
    for k in range(1, cap + 1):
        asked = cap if alone else k
        total = wait_s + asked * step_s + verify_s[k]
        gain = expected[k] * verify_s[0] / total
        if gain > best[0]:
            best = (gain, total, asked)
    return best
