"""What a draft step costs here, by exit and number of sessions: profiled once, refined by every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from actors.costs import CostModel
from actors.drafting.interface import Drafter, DraftQuery, SessionOpen
from actors.sampling.params import DraftSampling

PROFILED_SESSIONS = (1, 2, 4, 8)
_PROFILE_TOKENS = 8
_PROFILE_LENGTH = 4


class StepTimes:
    """Seconds of a step that adds one token to each of n sessions.

    Args:
        exits: depths in layers, ascending.
    """

    def __init__(self, exits: Sequence[int]) -> None:
        self._exits = tuple(exits)
        self._costs = tuple(CostModel() for _ in exits)

    def observe(self, exit_index: int | None, sessions: int, seconds: float) -> None:
        """Add a step; None, a step without a fixed exit, is ignored."""
        if exit_index is not None:
            self._costs[exit_index].ended(sessions, seconds)

    def seconds(self) -> Mapping[int, Mapping[int, float]]:
        """By exit depth and number of sessions; exits that were never timed are missing. Any thread."""
        tables = zip(self._exits, self._costs, strict=True)
        return {depth: table for depth, cost in tables if (table := cost.measured())}

    def profile(self, drafter: Drafter, max_sessions: int) -> None:
        """Let `drafter` draft for sessions of its own, which reports its steps to `observe`."""
        counts = [n for n in PROFILED_SESSIONS if n <= max_sessions]
        ids = range(-max(counts, default=0), 0)
        for sid in ids:
            drafter.open(SessionOpen(sid, (0,) * _PROFILE_TOKENS, _PROFILE_TOKENS, DraftSampling(key=0)))
        try:
            for warm in (False, True):
                for depth in self._exits:
                    for count in counts:
                        queries = [DraftQuery(sid, 1, _PROFILE_LENGTH, depth) for sid in ids[:count]]
                        drafter.propose(queries)
                if not warm:  # the first pass allocates and compiles
                    self._costs = tuple(CostModel() for _ in self._exits)
        finally:
            for sid in ids:
                drafter.close(sid)
