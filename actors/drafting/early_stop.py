"""When a draft ends before its budget: SpecDec++'s rule (arXiv 2405.19715) on calibrated confidence.

The optimal policy is a threshold on the probability that some token so far is rejected. That probability is
1 - the product of the tokens' acceptance probabilities, each read from a curve that was fitted on held-out
answers. The token that crosses the threshold is kept: it has been paid for, and the target's controller
decides whether to verify it. Whatever the rule says, verification is unchanged.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Curve(Protocol):
    """Knots of a non-decreasing curve from a draft's own probability of its token to acceptance."""

    @property
    def confidence(self) -> Sequence[float]: ...

    @property
    def acceptance(self) -> Sequence[float]: ...


class ExitCurves(Protocol):
    """`sampled` is None where nothing was measured: then `greedy` serves both."""

    @property
    def greedy(self) -> Curve: ...

    @property
    def sampled(self) -> Curve | None: ...


def interpolate(curve: Curve, confidence: float) -> float:
    """The curve at a confidence: linear between knots, constant outside."""
    xs, ys = curve.confidence, curve.acceptance
    place = bisect_right(xs, confidence)
    if place == 0:
        return ys[0]
    if place == len(xs):
        return ys[-1]
    share = (confidence - xs[place - 1]) / (xs[place] - xs[place - 1])
    return ys[place - 1] + share * (ys[place] - ys[place - 1])


@dataclass(frozen=True, slots=True)
class EarlyStop:
    """curves: one an exit, empty to take confidences as they are. threshold: a draft ends when the
    probability of a rejection so far exceeds it; None never ends one early."""

    curves: Sequence[ExitCurves] = ()
    threshold: float | None = None

    def acceptance(self, exit_index: int, confidence: float, *, greedy: bool) -> float:
        """Probability that the token is accepted, given that those before it are."""
        if not self.curves:
            return confidence
        curves = self.curves[exit_index]
        return interpolate(curves.greedy if greedy or curves.sampled is None else curves.sampled, confidence)

    @property
    def floor(self) -> float:
        """A draft ends once the probability that all its tokens are accepted is below this."""
        return 0.0 if self.threshold is None else 1.0 - self.threshold

    def ends(self, survival: float) -> bool:
        """Whether a draft whose tokens are all accepted with probability `survival` ends here."""
        return survival < self.floor
