"""Messages between the asyncio side and the engine: plain, frozen and serialisable.

The two sides meet in two queues of these, so that the engine can become a process of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from actors.drafting.assignment import UNRESTRICTED, DraftAssignment
from actors.drafting.interface import ResetScope as ResetScope
from actors.drafting.interface import ServedRounds
from actors.sampling.params import SamplingParams, SpeculationParams
from actors.sampling.results import TokenLogprobs

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One choice of one prompt.

    `output_ids_so_far` are tokens already emitted elsewhere (resume after a lost replica): they count as
    output for penalties, limits and grammar, and are not emitted again. The noise key is
    H(sampling.seed, choice). `delivery_interval_s` is how long outputs may be held back, to be delivered
    together; the first and the last never are.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    speculation: SpeculationParams = field(default_factory=SpeculationParams)
    choice: int = 0
    output_ids_so_far: tuple[int, ...] = ()
    delivery_interval_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("prompt_ids must not be empty")


@dataclass(frozen=True, slots=True)
class RoundReport:
    """What speculation did for one request in one round. `drafted` tokens were verified, the first
    `accepted` of them emitted. `drafter` is None in a round without drafts."""

    drafted: int = 0
    accepted: int = 0
    drafter: str | None = None
    exit_depth: int | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one engine step emitted for one request.

    `token_ids` lists this step's tokens: accepted drafts first, then the target's own (bonus) token.
    A stop id is the last token and is included. `cached_tokens` (prompt tokens served from the prefix
    cache) and `prompt_logprobs` come with the first output; index 0 of the latter is None.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    round: RoundReport | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    error: str | None = None
    queue_s: float | None = None
    """Seconds from arrival to first being scheduled; with the first output only."""

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class DrafterStats:
    """Counts since start for one drafter: rounds, drafted, accepted, and accepted per position."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_per_position: tuple[int, ...] = ()
    accepted_per_position: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class DraftingMeasurements:
    """What a router needs to know of a target; counts since start, times in seconds.

    cost_s_by_rows: of a round, by token rows in its forward pass. acceptance_by_exit: conditional acceptance
    by position and tokens scored there, by exit depth. asked_tokens: draft tokens asked for, of a nested
    drafter at most its cap. served: what draft workers did. latency_s: of a round trip without the drafting,
    by draft worker. shadow_tokens: scored in shadow. holds_draft: whether the nested drafter also drafts in
    this process.
    """

    cost_s_by_rows: dict[int, float] = field(default_factory=dict)
    acceptance_by_exit: dict[int, tuple[tuple[float, ...], tuple[int, ...]]] = field(default_factory=dict)
    asked_tokens: int = 0
    served: ServedRounds = field(default_factory=ServedRounds)
    latency_s: dict[str, float] = field(default_factory=dict)
    shadow_tokens: int = 0
    holds_draft: bool = False


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot, read directly from the engine thread's last step."""

    running: int = 0
    waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    """Blocks held by running requests."""
    kv_blocks_cached: int = 0
    """Blocks held only by the prefix cache; free for the taking."""
    kv_blocks_free: int = 0
    """Blocks not held by a running request (cached ones included)."""
    steps: int = 0
    tokens_emitted: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    preemptions: int = 0
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds since start by phase of a round, see `actors.engine.phases`."""
    idle_s: float = 0.0
    """Seconds since start in which no request was inside."""
    clock_s: float = 0.0
    """time.perf_counter() of the engine's process when `idle_s` was read."""
    drafted_rounds: int = 0
    """Since start, per request; a tree of several drafters is one, though it counts for each of them."""
    drafters: dict[str, DrafterStats] = field(default_factory=dict)
    draft_source: dict[str, object] = field(default_factory=dict)
    """State of the source of drafts: connected workers, late rounds, reconnects."""
    controller: dict[str, object] = field(default_factory=dict)
    """Measured costs and acceptance, and the lengths last chosen, with the reason."""
    drafting: DraftingMeasurements = field(default_factory=DraftingMeasurements)
    assignment: DraftAssignment = UNRESTRICTED
    """What the router allows, as the engine obeys it."""
