"""What rounds cost on this machine, measured: profiled at start-up, refined by every round."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from actors.isotonic import isotonic

_SMOOTHING = 0.1
_FOLLOWING = 0.8
"""How much of a row count's change, in logarithms, the others are taken to share."""
_OUTLIER = 4.0
_FEW = 8
"""Measurements of a row count from which on it is believed whatever others say."""


class CostModel:
    """Seconds of one engine round by the number of token rows in its forward pass.

    Known row counts hold exponential averages; others are interpolated linearly, and extrapolated with the
    slope of the last two known ones. Predictions never fall with the row count: neighbours that contradict
    that are averaged (isotonic regression). A measurement also pulls the other row counts along, so that a
    profile taken while the machine was busy does not outlive that. Whatever disturbs a measurement only adds
    to it: a row count that few rounds had is believed to cost no more than larger ones do.

    What a round takes longer the longer its sequences are is kept apart (`attention_s`): drafts of a long
    sequence cost more than those of a short one.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._rounds: dict[int, int] = {}
        """Measurements of a row count, a profile being the first."""
        self._rows: list[int] = []
        self._fitted: list[float] = []
        self._cache: dict[int, float] = {}
        self._read_s = self._attend_s = 0.0

    def attention_s(self, context: int, rows: int = 1) -> float:
        """Seconds that attention over `context` KV entries adds for `rows` rows of one sequence."""
        return context * (self._read_s + self._attend_s * (rows - 1))

    def drafted_attention_s(self, context: int) -> float:
        """What one more row of the sequence adds."""
        return context * self._attend_s

    def observe(self, rows: int, seconds: float, attention_s: float = 0.0) -> None:
        """Add a measurement, `attention_s` of which was expected for attention. A stray outlier (a stolen
        core) moves the average by a bounded amount."""
        seconds = max(seconds - attention_s, seconds / _OUTLIER)
        known = self._seconds.get(rows)
        if known is None:
            self._seconds[rows] = seconds  # first, for `measured` in another thread
            self._rows.insert(bisect_left(self._rows, rows), rows)
        else:
            bounded = min(max(seconds, known / _OUTLIER), known * _OUTLIER)
            # The smallest row count has many rounds, and pulls the others along with each.
            few = self._rounds[rows] < _FEW and rows != self._rows[0]
            smoothing = 1.0 if few and bounded < known else _SMOOTHING
            self._seconds[rows] = known + smoothing * (bounded - known)
            # In logarithms, a share of what an average does: what noise adds and takes away again cancels. A
            # share of each measurement's error would add up without end, with its square.
            drift = (1.0 + _SMOOTHING * (bounded / known - 1.0)) ** _FOLLOWING
            for other in self._rows:
                if other != rows:
                    self._seconds[other] *= drift
        self._rounds[rows] = self._rounds.get(rows, 0) + 1
        self._changed()

    def profile(self, run: Callable[[int], float], row_counts: Sequence[int], repeats: int = 3) -> None:
        """Measure each row count: the best of `repeats` runs of `run(rows) -> seconds`."""
        for rows in row_counts:
            self.observe(rows, min(run(rows) for _ in range(repeats)))

    def remeasure(self, rows: int, run: Callable[[int], float], repeats: int = 5) -> None:
        """Measure a row count again; only a shorter time counts, since what disturbs it only adds."""
        seconds = min(run(rows) for _ in range(repeats))
        if seconds < self._seconds.get(rows, 0.0):
            self._seconds[rows] = seconds
            self._changed()

    def _changed(self) -> None:
        self._fitted = []
        self._cache.clear()

    def profile_attention(
        self, run: Callable[[int, int], float], rows: int, contexts: tuple[int, int], repeats: int = 3
    ) -> None:
        """Measure what context costs, from `run(rows, context) -> seconds` with one row and with `rows`, at a
        short and a long context."""
        short, long = contexts
        added = {
            count: min(run(count, long) for _ in range(repeats))
            - min(run(count, short) for _ in range(repeats))
            for count in (1, rows)
        }
        self._read_s = max(0.0, added[1] / (long - short))
        # The first row also fetches what the others find in a cache: where they seem dearer, the machine
        # was busy.
        further = (added[rows] - added[1]) / ((rows - 1) * (long - short))
        self._attend_s = min(self._read_s, max(0.0, further))

    def seconds(self, rows: int) -> float:
        """Predicted seconds of a round over `rows` rows without attention over context; 0.0 while nothing has
        been measured."""
        cached = self._cache.get(rows)
        if cached is None:
            cached = self._cache[rows] = self._predict(rows)
        return cached

    def _predict(self, rows: int) -> float:
        if not self._rows:
            return 0.0
        if not self._fitted:
            values = [self._seconds[known] for known in self._rows]
            for i in range(len(values) - 2, -1, -1):
                if self._rounds[self._rows[i]] < _FEW:
                    values[i] = min(values[i], values[i + 1])
            self._fitted = isotonic(values)
        at = bisect_left(self._rows, rows)
        if at == 0:
            return self._fitted[0]
        if at < len(self._rows):
            low, high = self._rows[at - 1], self._rows[at]
            share = (rows - low) / (high - low)
            return self._fitted[at - 1] + share * (self._fitted[at] - self._fitted[at - 1])
        if at == 1:
            return self._fitted[0]
        run = self._rows[-1] - self._rows[-2]
        slope = (self._fitted[-1] - self._fitted[-2]) / run
        return self._fitted[-1] + slope * (rows - self._rows[-1])

    def measured(self) -> dict[int, float]:
        """Seconds by row count, as averaged so far. Safe from any thread."""
        return {rows: self._seconds[rows] for rows in tuple(self._rows)}

    def table(self) -> dict[str, float]:
        """Milliseconds by row count, for people."""
        return {str(rows): round(self._seconds[rows] * 1e3, 3) for rows in self._rows}

    def attention_table(self) -> dict[str, float]:
        """Microseconds a KV entry, for people: of a sequence's first row, and of each further one."""
        return {"first_row": round(self._read_s * 1e6, 4), "further_row": round(self._attend_s * 1e6, 4)}
