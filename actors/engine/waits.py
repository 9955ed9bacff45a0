"""What drafts cost a round before anything is verified: how long it stands still for them, by how many
requests ask and for how many tokens at most, and what keeping their books takes."""

from __future__ import annotations

_SMOOTHING, _SLOW = 0.15, 0.02
_OUTLIER = 3.0
"""A wait counts as no longer than so many times the average, or `_FIRST_S`: a stray one would be believed for
long where few ask."""
_LONGEST_S = 0.1
_FIRST_S = 1e-3
"""Taken for one request before anything has been measured."""


class DraftWaits:
    """Averages in seconds, by (requests that ask, tokens that the longest draft may have).

    What has not been asked for yet is judged by the nearest that has: of as many requests, or else of the
    nearest number. More requests are taken to wait longer in proportion, which drafting for each of them
    costs at most; longer drafts as long as shorter ones, until they have been tried. What drafters read
    first, of requests that have not asked for a while, is kept apart: who goes on asking will not wait for
    that."""

    def __init__(self) -> None:
        self._known: dict[int, dict[int, float]] = {}
        self._mean_s: float | None = None
        self._catching_up_s: float | None = None

    def observe(self, seconds: float, asking: int, longest: int = 1, *, catching_up: bool = False) -> None:
        """One round's wait. `catching_up`: one of the requests has not asked for a while."""
        seconds = min(seconds, _LONGEST_S)
        if catching_up:
            if asking == 1:
                before = self._catching_up_s
                self._catching_up_s = seconds if before is None else _follow(before, seconds)
            return
        before = self.expected(asking, longest)
        by_length = self._known.setdefault(asking, {})
        if longest in by_length:
            by_length[longest] = _follow(before, seconds)
        else:
            by_length[longest] = min(seconds, _OUTLIER * max(before, _FIRST_S))
        self._mean_s = _follow(_FIRST_S if self._mean_s is None else self._mean_s, seconds)

    @property
    def seldom(self) -> float:
        """Seconds that a round stands still for one request that has not asked for a while."""
        return self.expected(1) if self._catching_up_s is None else self._catching_up_s

    def least(self, asking: int, longest: int = 1) -> float:
        """As `expected`, for a number of requests that has not asked yet, if many wait no longer than fewer
        do."""
        fewer = [n for n in self._known if n <= asking]
        return _nearest(self._known[max(fewer)], longest) if fewer else _FIRST_S

    def expected(self, asking: int, longest: int = 1) -> float:
        """Seconds that a round will stand still."""
        if not self._known:
            return _FIRST_S * asking
        nearest = min(self._known, key=lambda n: abs(n - asking))
        return _nearest(self._known[nearest], longest) * max(1.0, asking / nearest)

    @property
    def mean_s(self) -> float:
        """Whoever asked; 0 before the first."""
        return self._mean_s or 0.0

    def table(self) -> dict[str, dict[str, float]]:
        """Milliseconds by number of requests and length, for people. Safe from any thread."""
        return {
            str(asking): {str(n): round(seconds * 1e3, 3) for n, seconds in sorted(by_length.copy().items())}
            for asking, by_length in sorted(self._known.copy().items())
        }


class RoundOverhead:
    """What rounds take beside drafts and the target's pass (scheduling, candidates, commits, planning):
    averages by number of requests where nobody asks for drafts, and what each that asks adds to it."""

    def __init__(self) -> None:
        self._plain_s: dict[int, float] = {}
        self._asking_s = 0.0
        self._observed = 0

    def observe(self, seconds: float, requests: int, asking: int) -> None:
        """One round of so many requests."""
        if not asking:
            before = self._plain_s.get(requests)
            self._plain_s[requests] = seconds if before is None else _follow(before, seconds, _SLOW)
        elif self._plain_s:
            nearest = min(self._plain_s, key=lambda n: abs(n - requests))
            added = (seconds - self._plain_s[nearest]) / asking
            # Bounded on both sides: without what falls below zero, noise alone would seem to cost something.
            added = max(-_FIRST_S, min(_FIRST_S, added))
            self._observed += 1
            self._asking_s += max(_SLOW, 1.0 / self._observed) * (added - self._asking_s)

    @property
    def asking_s(self) -> float:
        """Seconds that a request which asks for drafts adds; 0 before anything is known."""
        return max(0.0, self._asking_s)


def _nearest(by_length: dict[int, float], longest: int) -> float:
    return by_length[min(by_length, key=lambda n: abs(n - longest))]


def _follow(average: float, seconds: float, smoothing: float = _SMOOTHING) -> float:
    # Neither the short waits nor the long ones: drafting takes longer in some rounds than in others, and what
    # it costs is their mean.
    return average + smoothing * (min(seconds, _OUTLIER * max(average, _FIRST_S)) - average)
