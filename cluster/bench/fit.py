"""Does a time grow linearly? A line through it, and how much of its end a quadratic term would explain.

Every repeat of the measurement is a curve of its own. The line is fitted to the medians. A parabola
`a + b x + c x^2` is fitted to each repeat; the share `c x^2 / (a + b x + c x^2)` at the greatest x says how
much of the time there is quadratic. The median of the shares has the distribution-free 95 % interval of
`cluster.bench.paired`; a quadratic term is resolved when that interval is on one side of zero.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.bench.paired import median_interval_rank


@dataclass(frozen=True, slots=True)
class GrowthFit:
    """intercept, slope: of the line, in the unit of the times, and that per unit of x. worst_residual: the
    greatest |time - line| / time. share: quadratic part of the time at the greatest x, median over repeats,
    negative where the curve bends down; low and high bound it, None with fewer than 6 repeats."""

    intercept: float
    slope: float
    worst_residual: float
    share: float
    low: float | None
    high: float | None

    @property
    def resolved(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def fit_growth(xs: Sequence[float], repeats: Sequence[Sequence[float]]) -> GrowthFit:
    """repeats: times by repeat, then by x. Raises ValueError with fewer than 4 different x or no repeat."""
    if len(set(xs)) < 4 or not repeats:
        raise ValueError("a quadratic fit needs 4 different lengths and a repeat")
    top = max(xs)
    scaled = np.asarray(xs, dtype=float) / top  # powers of thousands would be badly conditioned
    medians = np.median(np.asarray(repeats, dtype=float), axis=0)
    slope, intercept = np.polyfit(scaled, medians, 1)
    line = intercept + slope * scaled
    shares = sorted(quadratic_share(scaled, times) for times in repeats)
    rank = median_interval_rank(len(shares))
    return GrowthFit(
        float(intercept),
        float(slope / top),
        float(np.max(np.abs(medians - line) / medians)),
        statistics.median(shares),
        shares[rank - 1] if rank else None,
        shares[-rank] if rank else None,
    )


def quadratic_share(scaled: Sequence[float] | NDArray[np.float64], times: Sequence[float]) -> float:
    """Of one curve, at x = 1."""
    c, b, a = np.polyfit(scaled, np.asarray(times, dtype=float), 2)
    return float(c / (a + b + c))
