"""Is A faster than B? Ratios within pairs of runs that follow each other, their median, and a bound on it.

Method. A pair measures A and B on the same work within moments, so that a slow minute of the machine hits
both; what is compared is the ratio A / B of each pair. The 95 % interval of the median ratio is the exact,
distribution-free one from order statistics (the inverted sign test): for n pairs the k-th smallest and k-th
largest ratio, with the largest k for which a Binomial(n, 1/2) is below k with probability at most 0.025. It
assumes that pairs are independent, nothing about how ratios are distributed, and no interval exists below 6
pairs. A comparison is resolved when it has at least 15 pairs and the interval excludes the threshold.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

MIN_PAIRS = 15
CONFIDENCE = 0.95
Verdict = Literal["above", "below", "not resolved"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """`low` and `high` bound the median ratio with 95 % confidence; None with fewer than 6 pairs. `minimum`
    and `maximum` are the spread of the ratios."""

    pairs: int
    median: float
    low: float | None
    high: float | None
    minimum: float
    maximum: float
    threshold: float
    verdict: Verdict

    @property
    def resolved(self) -> bool:
        return self.verdict != "not resolved"


def median_interval_rank(count: int, confidence: float = CONFIDENCE) -> int:
    """The largest k with P(Binomial(count, 1/2) < k) <= (1 - confidence) / 2; 0 when there is none. The k-th
    smallest and the k-th largest of `count` values then hold the median between them."""
    allowed, below, rank = (1.0 - confidence) / 2.0, 0.0, 0
    for successes in range(count // 2 + 1):
        below += math.comb(count, successes) / 2**count
        if below > allowed:
            break
        rank = successes + 1
    return rank


def compare_ratios(ratios: Sequence[float], threshold: float = 1.0) -> Comparison | None:
    """None without ratios. Raises ValueError for a ratio that is not a positive number."""
    if not ratios:
        return None
    if not all(math.isfinite(r) and r > 0 for r in ratios):
        raise ValueError("ratios must be positive and finite")
    ordered = sorted(ratios)
    rank = median_interval_rank(len(ordered))
    low, high = (ordered[rank - 1], ordered[-rank]) if rank else (None, None)
    verdict: Verdict = "not resolved"
    if len(ordered) >= MIN_PAIRS and low is not None and high is not None:
        if low > threshold:
            verdict = "above"
        elif high < threshold:
            verdict = "below"
    return Comparison(
        pairs=len(ordered),
        median=statistics.median(ordered),
        low=low,
        high=high,
        minimum=ordered[0],
        maximum=ordered[-1],
        threshold=threshold,
        verdict=verdict,
    )


def compare(
    ours: Mapping[Hashable, float], theirs: Mapping[Hashable, float], threshold: float = 1.0
) -> Comparison | None:
    """Of two sets of speeds by pair; pairs that only one side has are left out."""
    common = [key for key in ours if key in theirs]
    return compare_ratios([ours[key] / theirs[key] for key in common], threshold)


def with_plain(engines: Iterable[str], plain_of: Callable[[str], str | None]) -> list[tuple[str, str]]:
    """(engine, the same without speculation) for those of `engines` of which both are there, in order."""
    there = dict.fromkeys(engines)
    return [(engine, plain) for engine in there if (plain := plain_of(engine)) in there and plain]
