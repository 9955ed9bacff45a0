"""How long rounds stand still for drafts, by how many requests ask for them."""

from __future__ import annotations

_SMOOTHING = 0.15
_OUTLIER = 3.0
"""A wait counts as no longer than so many times the average, or `_FIRST_S`: a stray one would be believed for
long where few ask."""
_LONGEST_S = 0.1
_FIRST_S = 1e-3
"""Taken for one request before anything has been measured."""


class DraftWaits:
    """Averages in seconds. A number of requests that has not asked yet is judged by the nearest one that has:
    more are taken to wait longer in proportion, which drafting for each of them costs at most. What drafters
    read first, of requests that have not asked for a while, is kept apart: who goes on asking will not wait
    for that."""

    def __init__(self) -> None:
        self._by_asking: dict[int, float] = {}
        self._mean_s: float | None = None
        self._catching_up_s: float | None = None

    def observe(self, seconds: float, asking: int, *, catching_up: bool = False) -> None:
        """One round's wait, of `asking` >= 1 requests. `catching_up`: one has not asked for a while."""
        seconds = min(seconds, _LONGEST_S)
        if catching_up:
            if asking == 1:
                before = self._catching_up_s
                self._catching_up_s = seconds if before is None else _follow(before, seconds)
            return
        if asking in self._by_asking:
            self._by_asking[asking] = _follow(self.expected(asking), seconds)
        else:
            self._by_asking[asking] = min(seconds, _OUTLIER * max(self.expected(asking), _FIRST_S))
        self._mean_s = _follow(_FIRST_S if self._mean_s is None else self._mean_s, seconds)

    @property
    def seldom(self) -> float:
        """Seconds that a round stands still for one request that has not asked for a while."""
        return self.expected(1) if self._catching_up_s is None else self._catching_up_s

    def least(self, asking: int) -> float:
        """The same for a number that has not asked yet, if many wait no longer than fewer do."""
        fewer = [n for n in self._by_asking if n <= asking]
        return self._by_asking[max(fewer)] if fewer else _FIRST_S

    def expected(self, asking: int) -> float:
        """Seconds that a round of `asking` requests will stand still."""
        if asking in self._by_asking:
            return self._by_asking[asking]
        nearest = min(self._by_asking, key=lambda n: abs(n - asking), default=None)
        if nearest is None:
            return _FIRST_S * asking
        return self._by_asking[nearest] * max(1.0, asking / nearest)

    @property
    def mean_s(self) -> float:
        """Whoever asked; 0 before the first."""
        return self._mean_s or 0.0

    def table(self) -> dict[str, float]:
        """Milliseconds by number of requests, for people."""
        return {str(asking): round(self._by_asking[asking] * 1e3, 3) for asking in sorted(self._by_asking)}


def _follow(average: float, seconds: float) -> float:
    # Neither the short waits nor the long ones: drafting takes longer in some rounds than in others, and what
    # it costs is their mean.
    return average + _SMOOTHING * (min(seconds, _OUTLIER * max(average, _FIRST_S)) - average)
