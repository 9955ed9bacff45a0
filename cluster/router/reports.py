"""What the router is told each second: one report a target worker, one a draft worker."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ExitAcceptance:
    """P(token j accepted | those before it are) by position j, and how many drafts have been scored so far.
    `trials` only tells whether there is news; it may start again from zero with the target worker."""

    by_position: tuple[float, ...]
    trials: int

    def __post_init__(self) -> None:
        if not self.by_position or any(not 0.0 <= a <= 1.0 for a in self.by_position) or self.trials < 0:
            raise ValueError("acceptance must be probabilities, at least one, with a count of trials")


@dataclass(frozen=True, slots=True)
class DraftUse:
    """How a target drafts now: `length` is the mean number of draft tokens that a request verifies."""

    worker: str
    exit: int
    length: float


@dataclass(frozen=True, slots=True)
class TargetReport:
    """One target worker.

    worker: its id. model: what it serves. cost_s: seconds of a round by token rows, ascending in both.
    acceptance: by exit depth, of exits used and scored in shadow alike. running: requests that decode, mean of
    the last second. rounds_per_s: measured. use: current drafting, None without. latency_s: round trip to a
    draft worker beside drafting itself, by its id. compatible: draft workers that may draft for it; None: all.
    """

    worker: str
    model: str
    cost_s: Mapping[int, float]
    acceptance: Mapping[int, ExitAcceptance] = field(default_factory=dict)
    running: float = 0.0
    rounds_per_s: float = 0.0
    use: DraftUse | None = None
    latency_s: Mapping[str, float] = field(default_factory=dict)
    compatible: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if not self.cost_s or any(r < 1 or not 0 < s < math.inf for r, s in self.cost_s.items()):
            raise ValueError(f"{self.worker}: cost_s needs positive seconds by positive rows")
        if not (0 <= self.running < math.inf and 0 <= self.rounds_per_s < math.inf):
            raise ValueError(f"{self.worker}: running and rounds_per_s must be finite and not negative")


@dataclass(frozen=True, slots=True)
class DraftReport:
    """One draft worker.

    token_s: by exit depth (layers), seconds of one draft token for a batch by its number of sessions.
    drafters: what it can draft with. open_sessions: of how many (`max_sessions`). utilisation: busy share.
    """

    worker: str
    token_s: Mapping[int, Mapping[int, float]]
    drafters: tuple[str, ...] = ("nested",)
    open_sessions: int = 0
    max_sessions: int = 256
    utilisation: float = 0.0

    def __post_init__(self) -> None:
        for depth, costs in self.token_s.items():
            if depth < 1 or not costs or any(n < 1 or not 0 < s < math.inf for n, s in costs.items()):
                raise ValueError(f"{self.worker}: exit {depth} needs positive seconds by positive sessions")
