"""What rounds cost on this machine, measured: profiled at start-up, refined by every round."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

_SMOOTHING = 0.1
_OUTLIER = 4.0


class CostModel:
    """Seconds of one engine round by the number of token rows in its forward pass.

    Known row counts hold exponential averages; others are interpolated linearly, and extrapolated with the
    slope of the last two known ones. A larger round is never predicted to be cheaper.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._rows: list[int] = []
        self._cache: dict[int, float] = {}

    def observe(self, rows: int, seconds: float) -> None:
        """Add a measurement. A stray outlier (a stolen core) moves the average by a bounded amount."""
        known = self._seconds.get(rows)
        if known is None:
            self._rows.insert(bisect_left(self._rows, rows), rows)
            self._seconds[rows] = seconds
        else:
            bounded = min(seconds, known * _OUTLIER)
            self._seconds[rows] = known + _SMOOTHING * (bounded - known)
        self._cache.clear()

    def profile(self, run: Callable[[int], float], row_counts: Sequence[int], repeats: int = 3) -> None:
        """Measure each row count: the best of `repeats` runs of `run(rows) -> seconds`."""
        for rows in row_counts:
            self.observe(rows, min(run(rows) for _ in range(repeats)))

    def seconds(self, rows: int) -> float:
        """Predicted seconds of a round over `rows` rows; 0.0 while nothing has been measured."""
        cached = self._cache.get(rows)
        if cached is None:
            cached = self._cache[rows] = self._predict(rows)
        return cached

    def _predict(self, rows: int) -> float:
        if not self._rows:
            return 0.0
        best = 0.0
        for known in self._rows:
            if known > rows:
                break
            best = max(best, self._seconds[known])
        at = bisect_left(self._rows, rows)
        if at < len(self._rows) and self._rows[at] == rows:
            return best
        if at == 0:
            return self._seconds[self._rows[0]]
        low = self._rows[at - 1]
        if at == len(self._rows):
            if at == 1:
                return best
            before = self._rows[at - 2]
            slope = max(0.0, (self._seconds[low] - self._seconds[before]) / (low - before))
            return best + slope * (rows - low)
        high = self._rows[at]
        share = (rows - low) / (high - low)
        return max(best, self._seconds[low] + share * (self._seconds[high] - self._seconds[low]))

    def table(self) -> dict[str, float]:
        """Milliseconds by row count, for people."""
        return {str(rows): round(self._seconds[rows] * 1e3, 3) for rows in self._rows}
