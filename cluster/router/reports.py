"""What the router hears and what it says: reports of workers, pins of operators, assignments. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from actors.drafting.interface import ServedRounds


@dataclass(frozen=True, slots=True)
class ExitAcceptance:
    """Measured acceptance of one exit. `rates[j]` is P(token j accepted | its ancestors accepted), in [0, 1];
    `trials[j]` counts the tokens that were scored at place j since the worker started."""

    rates: tuple[float, ...]
    trials: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.rates) != len(self.trials):
            raise ValueError("rates and trials must be equally long")


@dataclass(frozen=True, slots=True)
class DraftService:
    """How its draft worker served a target since the last report: means over the rounds that it drafted for.

    rounds_per_s: of these. seconds: from a round's arrival there to its answer. steps: of the nested drafter,
    one after the other. tokens: of nested drafts, over all requests.
    """

    rounds_per_s: float = 0.0
    seconds: float = 0.0
    steps: float = 0.0
    tokens: float = 0.0

    @classmethod
    def between(cls, before: ServedRounds, now: ServedRounds, seconds: float) -> DraftService:
        """From two counts, `seconds` apart."""
        rounds = now.rounds - before.rounds
        if rounds <= 0:
            return cls()
        return cls(
            rounds / seconds,
            (now.seconds - before.seconds) / rounds,
            (now.steps - before.steps) / rounds,
            (now.tokens - before.tokens) / rounds,
        )


@dataclass(frozen=True, slots=True)
class TargetReport:
    """One target worker.

    cost_s_by_rows: measured seconds of a verification round by rows in it (`actors.costs`).
    acceptance: by exit depth. running: requests that decode. rounds_per_s: engine rounds.
    draft_tokens_per_s: draft tokens that it asked for a second, over all its requests.
    latency_s: measured seconds of a draft round trip without the drafting, by draft worker.
    max_draft: longest draft that it can verify. weight: what its speed is worth to the operator.
    holds_draft: it drafts with a copy of its own; of the router's choices only pins hold for it.
    """

    target_id: str
    model: str
    cost_s_by_rows: Mapping[int, float]
    acceptance: Mapping[int, ExitAcceptance] = field(default_factory=dict)
    running: int = 0
    rounds_per_s: float = 0.0
    draft_tokens_per_s: float = 0.0
    service: DraftService = field(default_factory=DraftService)
    latency_s: Mapping[str, float] = field(default_factory=dict)
    max_draft: int = 8
    weight: float = 1.0
    holds_draft: bool = False

    def __post_init__(self) -> None:
        if not self.cost_s_by_rows or min(self.cost_s_by_rows.values()) <= 0.0:
            raise ValueError(f"{self.target_id}: cost_s_by_rows needs positive seconds")
        if self.running < 0 or self.max_draft < 0 or self.weight <= 0.0:
            raise ValueError(f"{self.target_id}: running and max_draft are at least 0, weight above")


@dataclass(frozen=True, slots=True)
class DraftReport:
    """One draft worker.

    step_s_by_exit: for each exit depth, measured seconds of a draft step that adds one token to each of n
        sessions, by n. drafters: names of what it runs. utilisation: share of the time that it drafted, 0..1.
    """

    worker_id: str
    step_s_by_exit: Mapping[int, Mapping[int, float]]
    drafters: tuple[str, ...] = ("nested",)
    open_sessions: int = 0
    max_sessions: int = 256
    utilisation: float = 0.0

    @property
    def exits(self) -> tuple[int, ...]:
        """Depths in layers, ascending."""
        return tuple(sorted(self.step_s_by_exit))


@dataclass(frozen=True, slots=True)
class Pin:
    """What an operator fixed for one target; None leaves it to the router. `exits` fixed: the best of them is
    taken. A cap of 0 forbids drafting."""

    worker_id: str | None = None
    exits: tuple[int, ...] | None = None
    cap: int | None = None

    def __post_init__(self) -> None:
        if self.exits is not None and not self.exits:
            raise ValueError("exits: give at least one, or none at all")
        if self.cap is not None and self.cap < 0:
            raise ValueError("cap: must be at least 0")

    @property
    def fixes_choice(self) -> bool:
        """Whether exit or length is fixed, so that the sorted order does not bind this target."""
        return self.exits is not None or self.cap is not None

    def __str__(self) -> str:
        parts = (("worker", self.worker_id), ("exits", self.exits), ("cap", self.cap))
        return ", ".join(f"{name} {value}" for name, value in parts if value is not None) or "nothing"


@dataclass(frozen=True, slots=True)
class ShadowScoring:
    """In `share` of the rounds `length` tokens of one session are also drafted at `exit` and scored against
    what the target emits. Nobody waits for them and nobody verifies them; they take `load` draft-seconds a
    second."""

    exit: int
    length: int
    share: float
    load: float


@dataclass(frozen=True, slots=True)
class Assignment:
    """Who drafts for a target. cap 0: it must not draft (`exits` is empty then, shadow scoring goes on).

    gain: predicted speed over plain decoding, 1.0 for none. load: predicted share of the draft worker's time.
    cap_pinned: an operator fixed the cap, so that it holds for drafters without a model too, which the router
        does not know. exits_pinned: he fixed the exit. For a target that holds its own copy of the draft, or
        where no draft worker lives, exits and cap are only what he fixed.
    """

    target_id: str
    worker_id: str | None
    exits: tuple[int, ...]
    cap: int
    reason: str
    gain: float = 1.0
    load: float = 0.0
    shadow: ShadowScoring | None = None
    cap_pinned: bool = False
    exits_pinned: bool = False

    @property
    def depth(self) -> int:
        """Deepest allowed exit, 0 for none."""
        return max(self.exits, default=0)
