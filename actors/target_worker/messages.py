"""Messages between the gateway and a target worker: what crosses the Serve handle."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from actors.sampling.params import SamplingParams, SpeculationParams
from actors.text.messages import ChatMessage

ErrorKind = Literal["invalid", "not_found", "overloaded", "unavailable", "internal"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt, `n` choices. Exactly one of prompt_text, prompt_ids and messages is set.

    max_tokens None means: what the context still holds. `sampling.max_tokens` is overwritten from it by the
    worker, and `sampling.eos_token_ids` filled in from the model. echo prepends the prompt to the text.
    `output_ids_so_far` (one choice only) resumes a request whose first chunks came from elsewhere, with the
    tokens that they brought, if any. Choices are numbered from `first_choice` on; each number has noise of
    its own. bad_words are not emitted, neither at the beginning of a text nor after a space;
    `sampling.bad_sequences` is filled in from them. include_stop leaves the stop string, or the stop id's
    text, in the text.
    """

    request_id: str
    sampling: SamplingParams
    prompt_text: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    messages: tuple[ChatMessage, ...] | None = None
    max_tokens: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    bad_words: tuple[str, ...] = ()
    echo: bool = False
    speculation: SpeculationParams = field(default_factory=SpeculationParams)
    output_ids_so_far: tuple[int, ...] | None = None
    first_choice: int = 0

    def __post_init__(self) -> None:
        given = [p is not None for p in (self.prompt_text, self.prompt_ids, self.messages)]
        if sum(given) != 1:
            raise ValueError("exactly one of prompt_text, prompt_ids and messages")


@dataclass(frozen=True, slots=True)
class TextLogprob:
    """One token's raw log-probability with its text and bytes."""

    token_id: int
    logprob: float
    token: str
    token_bytes: bytes


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    chosen: TextLogprob
    top: tuple[TextLogprob, ...] = ()
    text_offset: int = 0
    """Characters of the choice's text (prompt included with echo) before this token."""


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """AIPerf's acceptance payload. `acceptance_histogram[k]` counts steps that accepted k drafts; a step is a
    verification round with at least one draft.

    by_drafter is our own addition: (drafter, drafted, accepted) in the order of first use; a drafter with
    exits counts each exit as "name@depth"."""

    num_spec_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    acceptance_histogram: tuple[int, ...] = ()
    by_drafter: tuple[tuple[str, int, int], ...] = ()

    @property
    def mean_acceptance_length(self) -> float:
        return 1.0 + self.num_accepted_draft_tokens / self.num_spec_steps if self.num_spec_steps else 1.0

    @property
    def draft_acceptance_rate(self) -> float:
        return self.num_accepted_draft_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0


@dataclass(frozen=True, slots=True)
class RequestError:
    """Why a request cannot be served. `param` names the public field for kind "invalid"."""

    kind: ErrorKind
    message: str
    param: str | None = None
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """What one choice gained since its previous chunk; rounds may be coalesced.

    rounds lists (tokens, accepted drafts among them) per engine round, covering token_ids in order.
    finish_reason comes with the choice's last chunk, `stop_reason` is the stop string or stop id that ended
    it (None for end of sequence). usage comes with every choice's last chunk and covers that choice; the
    prompt is counted by choice 0 alone. The first chunk of a choice carries seed, prompt_logprobs and
    prompt_usage (what its usage will say of the prompt); with echo it carries prompt_token_ids and the
    prompt's text.
    A chunk with `error` ends the whole request.
    """

    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    rounds: tuple[tuple[int, int], ...] = ()
    logprobs: tuple[PositionLogprobs, ...] | None = None
    finish_reason: Literal["stop", "length", "abort", "error"] | None = None
    stop_reason: str | int | None = None
    usage: Usage | None = None
    prompt_usage: Usage | None = None
    speculation: SpeculationStats | None = None
    seed: int | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    error: RequestError | None = None
    queue_s: float | None = None
    """Seconds from arrival to first being scheduled; with a choice's first chunk only."""


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """What `/v1/models` and GetModelInfo report."""

    id: str
    source: str
    max_model_len: int
    dtype: str
    architecture: str
    vocab_size: int
    backend: str
    drafters: tuple[str, ...] = ()
    row_invariant: bool = False


@dataclass(frozen=True, slots=True)
class TargetState:
    """A live snapshot for `/state`, plain JSON values. See `EngineStats` for the engine's part.

    startup: seconds by phase of the start (`actors.target_worker.startup`), and `began`, its Unix time.
    """

    info: TargetInfo
    replica_id: str
    engine: dict[str, object] = field(default_factory=dict)
    draft_workers: tuple[dict[str, object], ...] = ()
    startup: dict[str, float] = field(default_factory=dict)
