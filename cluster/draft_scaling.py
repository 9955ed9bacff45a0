"""How many draft workers there are: as many as keep them busy for a given share of their time.

Draft workers receive no requests from Ray Serve, whose own measure would see nothing; what they are needed
for is the drafting of all targets together, and that is the time they spend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

UTILISATION = "utilisation"
"""Key of what a draft worker reports: share of the time since its last report that it drafted, 0 .. 1."""
TOLERANCE = 0.1
"""A pool whose workers are busy within this share of the target stays as it is."""


def desired_workers(utilisation: Sequence[float], target: float) -> float:
    """Workers that share the work so that each is busy for `target` of its time, given what the present ones
    are; their number itself where that is near enough. Not rounded, and not bounded."""
    count = len(utilisation)
    wanted = sum(utilisation) / target
    return float(count) if abs(wanted - count) <= TOLERANCE * count else wanted


class DraftPoolPolicy:
    """Ray Serve's autoscaling policy of the draft pool; rounding, delays and bounds are Serve's."""

    def __init__(self, target_utilisation: float) -> None:
        self._target = target_utilisation

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        reported = (context.aggregated_metrics or {}).get(UTILISATION) or {}
        if len(reported) < context.current_num_replicas or not reported:
            return context.target_num_replicas, {}  # one that has not reported yet counts for nothing
        return desired_workers(tuple(reported.values()), self._target), {}
