"""Measured seconds by a count: between and beyond the counts that were measured."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

from actors.isotonic import isotonic


class Curve:
    """Piecewise linear, constant below the first point, the last slope beyond the last. Points that fall are
    averaged: more rows are never cheaper (as `actors.engine.costs` has it)."""

    def __init__(self, points: Mapping[int, float]) -> None:
        if not points:
            raise ValueError("a curve needs a point")
        self._at = sorted(points)
        self._seconds = isotonic([points[x] for x in self._at])

    def __call__(self, count: float) -> float:
        at, seconds = self._at, self._seconds
        place = bisect_left(at, count)
        if place == 0 or len(at) == 1:
            return seconds[0]
        place = min(place, len(at) - 1)
        share = (count - at[place - 1]) / (at[place] - at[place - 1])
        return seconds[place - 1] + share * (seconds[place] - seconds[place - 1])
