"""What rounds cost on this machine, measured: profiled at start-up, refined by every round."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np

from actors.isotonic import isotonic

_NOISE = 0.3
"""Standard deviation of a round's time, in logarithms, as all of these."""
_LEVEL_STEP = 0.03
"""By how much the machine's speed changes from a round to the next."""
_SHAPE = 0.2
"""By how much the profile of a row count may be wrong beside those of the others."""
_SHAPE_STEP = 0.003
_QUICKER, _SLOWER = math.log(4.0), 2.0 * _NOISE
"""What counts at most of a round that was quicker or slower than expected: disturbances only add."""
_NEGLIGIBLE = 0.002
"""Change of own parts from which on predictions are made anew."""
_SETTLED, _SAMPLED = 16, 4
"""Measurements of a row count from which on one in so many of its rounds is observed."""
_FEW = 8
"""Measurements of a row count from which on it is believed whatever larger ones say."""
_EACH, _AN_OCTAVE = 32, 4
"""Row counts up to the first are told apart, of larger ones so many from one power of two to the next."""


class CostModel:
    """Seconds of one engine round by the number of token rows in its forward pass.

    The logarithm of a round's time is that of its row count in the profile, plus a level that all row counts
    share (the machine is busy, or slow), plus the row count's own part, plus noise. The level wanders, own
    parts hardly do; a Kalman filter follows both. So what one row count shows moves all of them as far as
    they cannot be told apart, and a row count that is met seldom keeps its place among the others. (Averages
    that pulled each other along instead lost the profile's shape within some hundred rounds: nine rows came
    to cost as much as four, or twice as much.)

    Row counts that were never met are interpolated linearly, and extrapolated with the slope of the last two
    known ones. Predictions never fall with the row count: neighbours that contradict that are averaged
    (isotonic regression), and a row count that few rounds had is believed to cost no more than larger ones
    do.

    What a round takes longer the longer its sequences are is kept apart (`attention_s`): drafts of a long
    sequence cost more than those of a short one.
    """

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._place: dict[int, int] = {}
        """Of a row count in the three that follow; the level comes first in the last two."""
        self._profile_s: list[float] = [1.0]
        self._parts = [0.0]
        self._slowdown = 1.0
        """What the level stands for: how much slower the machine is than when the profile was taken."""
        self._covariance = np.ones((1, 1))
        """To begin with nothing is known of the level: a profile is taken while nothing else is done."""
        self._rounds: dict[int, int] = {}
        """Measurements of a row count, a profile being the first."""
        self._passed: dict[int, int] = {}
        self._fitted: list[float] = []
        """Of the row counts known, at the level of the profile; `_cache` has what was asked for."""
        self._cache: dict[int, float] = {}
        self._moved = 0.0
        """How far own parts have moved since."""
        self._read_s = self._attend_s = 0.0
        self._read_together_s: float | None = None
        self._first_s = math.inf
        self._ratios: dict[int, list[float]] = {}
        """Of a profile: see there."""
        self._quickest_s: dict[tuple[str, int, int], float] = {}
        """Of rounds by kind, rows and context, from which these three come."""

    def attention_s(self, context: int, rows: int = 1, sequences: int = 1) -> float:
        """Seconds that attention over `context` KV entries adds for `rows` rows of one of `sequences`."""
        read_s = self._read_s if sequences == 1 else self._read_together
        return context * (read_s + self._attend_s * (rows - 1)) * self._slowdown

    @property
    def _read_together(self) -> float:
        return self._read_s if self._read_together_s is None else self._read_together_s

    def drafted_attention_s(self, context: int) -> float:
        """What one more row of the sequence adds."""
        return context * self._attend_s * self._slowdown

    def ended(self, rows: int, seconds: float, attention_s: Callable[[], float] = float) -> bool:
        """Observe a round, or pass it over: of row counts that are often met one round in `_SAMPLED` tells
        enough, as observing takes a good part of what choosing tokens does. `attention_s` gives what was
        expected for attention. Returns whether it was observed."""
        if self._rounds.get(rows, 0) >= _SETTLED:
            self._passed[rows] = passed = self._passed.get(rows, 0) + 1
            if passed % _SAMPLED:
                return False
        self.observe(rows, seconds, attention_s())
        return True

    def observe(self, rows: int, seconds: float, attention_s: float = 0.0) -> None:
        """Add a round, `attention_s` of which was expected for attention."""
        seconds = max(seconds - attention_s, seconds / 4.0, 1e-9)
        if rows not in self._place and (near := _told_apart(rows)) != rows:
            seconds *= self.seconds(near) / (self.seconds(rows) or 1.0) if self._rows else 1.0
            rows = near
        if rows not in self._place:
            if not self._rows or not self._rows[0] < rows < self._rows[-1]:
                self._add(rows, seconds / self._slowdown)
                return
            self._add(rows, self.seconds(rows) / self._slowdown)
        at = self._place[rows]
        self._rounds[rows] += 1
        covariance = self._known_covariance()
        covariance[0, 0] += _LEVEL_STEP**2
        covariance[at, at] += _SHAPE_STEP**2
        with_measured = covariance[0] + covariance[at]
        gain = with_measured / (with_measured[0] + with_measured[at] + _NOISE**2)
        error = max(-_QUICKER, min(_SLOWER, math.log(seconds / self._believed_s(rows))))
        self._parts = [part + share * error for part, share in zip(self._parts, gain.tolist(), strict=True)]
        self._slowdown = math.exp(self._parts[0])
        covariance -= gain[:, None] * with_measured
        self._moved += abs(float(gain[at]) * error)
        if self._moved > _NEGLIGIBLE or self._rounds[rows] == _FEW:
            self._changed()

    def _known_covariance(self) -> np.ndarray:
        """Of the level and all parts. A part that is new is independent of what was known before."""
        known, size = len(self._covariance), len(self._parts)
        if known < size:
            self._covariance = np.pad(self._covariance, (0, size - known))
            self._covariance[range(known, size), range(known, size)] = _SHAPE**2
        return self._covariance

    def _add(self, rows: int, profile_s: float) -> None:
        size = len(self._profile_s)
        self._parts.append(0.0)
        self._profile_s.append(profile_s)
        self._rounds[rows] = 1
        self._place[rows] = size  # before `_rows`, for `measured` in another thread
        self._rows.insert(bisect_left(self._rows, rows), rows)
        self._changed()

    def _believed_s(self, rows: int) -> float:
        return self._shape_s(rows) * self._slowdown

    def _shape_s(self, rows: int) -> float:
        """At the level of the profile."""
        at = self._place[rows]
        return self._profile_s[at] * math.exp(self._parts[at])

    def profile(self, run: Callable[[int], float], row_counts: Sequence[int], repeats: int = 3) -> None:
        """Measure row counts by `run(rows) -> seconds`, `repeats` times. They take turns: a machine that is
        slow for seconds would else be taken for the cost of some of them. The first one's best time counts,
        of the others what they took of the first one's in the same turn, on median. Measured again, all
        turns count, and what rounds have shown meanwhile is compared with the new profile from then on."""
        self._rebase()
        for _ in range(repeats):
            seconds = [run(rows) for rows in row_counts]
            self._first_s = min(self._first_s, seconds[0])
            for rows, mine in zip(row_counts, seconds, strict=True):
                self._ratios.setdefault(rows, []).append(mine / seconds[0])
        for rows in row_counts:
            seconds_now = self._first_s * statistics.median(self._ratios[rows])
            if rows in self._place:
                self._profile_s[self._place[rows]] = seconds_now
            else:
                self._add(rows, seconds_now)
        self._changed()

    def _rebase(self) -> None:
        """Take what is believed for the profile: own parts and the level are what differs from it."""
        self._profile_s[1:] = [self._believed_s(rows) for rows in self._place]
        self._parts = [0.0] * len(self._parts)
        self._slowdown, self._covariance = 1.0, np.ones((1, 1))

    def _changed(self) -> None:
        self._fitted = []
        self._cache.clear()
        self._moved = 0.0

    def profile_attention(
        self, run: Callable[[int, int], float], rows: int, contexts: tuple[int, int], repeats: int = 3
    ) -> None:
        """Measure what context costs, from `run(rows, context) -> seconds` with one row and with `rows` of
        one sequence, at a short and a long context."""
        added = {count: self._added_s("rows", run, count, contexts, repeats) for count in (1, rows)}
        self._read_s = max(0.0, added[1])
        # The first row also fetches what the others find in a cache: where they seem dearer, the machine
        # was busy.
        self._attend_s = min(self._read_s, max(0.0, (added[rows] - added[1]) / (rows - 1)))

    def profile_together(
        self, run: Callable[[int, int], float], sequences: int, contexts: tuple[int, int], repeats: int = 3
    ) -> None:
        """The same for one row each of several sequences, from `run(sequences, context) -> seconds`: they
        share threads better than the heads of one row do."""
        added = self._added_s("sequences", run, sequences, contexts, repeats) / sequences
        self._read_together_s = min(self._read_s, max(0.0, added))

    def _added_s(
        self,
        kind: str,
        run: Callable[[int, int], float],
        count: int,
        contexts: tuple[int, int],
        repeats: int,
    ) -> float:
        """Seconds an entry of context. Measured again, the quickest of all counts: a difference of two times
        has the noise of both."""
        for _ in range(repeats):  # in turns: a busy moment is not one context's alone
            for context in reversed(contexts):
                seconds, case = run(count, context), (kind, count, context)
                self._quickest_s[case] = min(seconds, self._quickest_s.get(case, seconds))
        short, long = contexts
        added = self._quickest_s[kind, count, long] - self._quickest_s[kind, count, short]
        return added / (long - short)

    def seconds(self, rows: int) -> float:
        """Predicted seconds of a round over `rows` rows without attention over context; 0.0 while nothing has
        been measured."""
        cached = self._cache.get(rows)
        if cached is None:
            cached = self._cache[rows] = self._predict(rows)
        return cached * self._slowdown

    def _predict(self, rows: int) -> float:
        """At the level of the profile."""
        if not self._rows:
            return 0.0
        if not self._fitted:
            values = [self._shape_s(known) for known in self._rows]
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
        """Seconds by row count, as believed now. Safe from any thread."""
        return {rows: self._believed_s(rows) for rows in tuple(self._rows)}

    def table(self) -> dict[str, float]:
        """Milliseconds by row count, for people."""
        return {str(rows): round(seconds * 1e3, 3) for rows, seconds in self.measured().items()}

    def attention_table(self) -> dict[str, float]:
        """Microseconds a KV entry, for people: of the first row of a sequence that is alone, or one of
        several, and of each further row."""
        read = {"first_row": self._read_s, "first_row_of_several": self._read_together}
        return {name: round(s * 1e6, 4) for name, s in {**read, "further_row": self._attend_s}.items()}


def _told_apart(rows: int) -> int:
    """The row count that stands for this one and some larger ones."""
    if rows <= _EACH:
        return rows
    step = (1 << (rows.bit_length() - 1)) // _AN_OCTAVE
    return rows // step * step
