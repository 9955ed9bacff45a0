"""What a request may ask of the sampler and of speculation.

Both classes cross process boundaries (Serve handle, engine queue), so they are frozen, hold plain
values only and validate themselves: an invalid value raises `ParameterError`, which names the field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

GREEDY_TEMPERATURE = 1e-5
"""Below this temperature the target emits the highest-scoring survivor without noise."""

MAX_TEMPERATURE = 1e6
REPETITION_PENALTIES = (1e-4, 1e4)
"""Scores stay finite float32 numbers: infinities would leave nothing to compare."""

VerificationName = Literal["coupled", "leviathan"]
GrammarKind = Literal["json_object", "json_schema", "regex", "lark"]
MAX_LOGPROBS = 20
MAX_DRAFT_TOKENS = 16
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


class ParameterError(ValueError):
    """A parameter has a value that cannot be served. `param` is the public name of the field."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param
        self.message = message

    def __reduce__(self) -> tuple[type[ParameterError], tuple[str, str]]:
        return type(self), (self.param, self.message)


def _require(ok: bool, param: str, message: str) -> None:
    if not ok:
        raise ParameterError(param, message)


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """A constraint on the output text. `text` is a JSON schema, a regular expression or a Lark grammar."""

    kind: GrammarKind
    text: str = ""


@dataclass(frozen=True, slots=True)
class SpeculationParams:
    """How one request uses speculation. Never changes what is emitted under the coupled rule.

    max_draft_tokens caps the tokens drafted a round; with `force` it fixes them, whatever the controller
    thinks. `drafter` and `exit_depth` pin the source of drafts; None leaves the choice. `tree`: whether
    drafts are trees or chains; None takes trees while the request decodes alone, where they can be, and
    chains with `force`.
    """

    enabled: bool = True
    max_draft_tokens: int | None = None
    force: bool = False
    drafter: str | None = None
    exit_depth: int | None = None
    verification: VerificationName | None = None
    tree: bool | None = None

    def __post_init__(self) -> None:
        if self.max_draft_tokens is not None:
            _require(
                0 <= self.max_draft_tokens <= MAX_DRAFT_TOKENS,
                "speculation.max_draft_tokens",
                f"must be between 0 and {MAX_DRAFT_TOKENS}",
            )
        if self.force:
            _require(
                self.max_draft_tokens is not None,
                "speculation.max_draft_tokens",
                "is required when speculation.force is true",
            )
        if self.exit_depth is not None:
            _require(self.exit_depth >= 1, "speculation.exit_depth", "must be at least 1")
        _require(
            self.verification in (None, "coupled", "leviathan"),
            "speculation.verification",
            "must be 'coupled' or 'leviathan'",
        )


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one choice, in the order in which they are applied.

    Order: masks (grammar, allowed_token_ids, bad_sequences), logit_bias, min_tokens (masks every stop id),
    repetition, presence and frequency penalties, division by temperature, min_p, top_k, top_p.

    Attributes:
        max_tokens: tokens to emit at most (counted over `output_ids_so_far` too); at least 0.
        min_tokens: no end-of-sequence or stop id before this many tokens.
        allowed_token_ids: nothing else is emitted; empty for no such limit.
        bad_sequences: token sequences that are never completed: the last id of one is forbidden where the
            output ends with those before it. Filled in by the worker from a request's bad_words.
        seed: any int64; the noise key is H(seed, choice).
        repetition_penalty: over prompt and output ids (Hugging Face's rule).
        presence_penalty, frequency_penalty: over output ids (OpenAI's rule).
        eos_token_ids: the model's end ids; ignored when ignore_eos. stop_token_ids always stop.
        logprobs: number of alternatives a token, None for no logprobs; raw log-softmax.
        prompt_logprobs: the same for prompt tokens.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()
    bad_sequences: tuple[tuple[int, ...], ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: GrammarSpec | None = None

    def __post_init__(self) -> None:
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
        ):
            _require(math.isfinite(getattr(self, name)), name, "must be a finite number")
        _require(self.max_tokens >= 0, "max_tokens", "must not be negative")
        _require(self.min_tokens >= 0, "min_tokens", "must not be negative")
        _require(self.min_tokens <= self.max_tokens, "min_tokens", "must not exceed max_tokens")
        _require(
            0.0 <= self.temperature <= MAX_TEMPERATURE, "temperature", f"must be 0 to {MAX_TEMPERATURE:g}"
        )
        _require(0.0 < self.top_p <= 1.0, "top_p", "must be in (0, 1]")
        _require(self.top_k >= 0, "top_k", "must be 0 (off) or a positive number")
        _require(0.0 <= self.min_p <= 1.0, "min_p", "must be in [0, 1]")
        _require(INT64_MIN <= self.seed <= INT64_MAX, "seed", "must be a 64-bit integer")
        _require(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "must be in [-2, 2]")
        _require(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "must be in [-2, 2]")
        least, most = REPETITION_PENALTIES
        _require(
            least <= self.repetition_penalty <= most, "repetition_penalty", f"must be {least:g} to {most:g}"
        )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(value is None or 0 <= value <= MAX_LOGPROBS, name, f"must be in [0, {MAX_LOGPROBS}]")
        for bias in self.logit_bias.values():
            _require(
                math.isfinite(bias) and -100 <= bias <= 100, "logit_bias", "values must be in [-100, 100]"
            )
        _require(all(self.bad_sequences), "bad_words", "must not be empty")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end the output: the explicit ones, and the model's own unless ignored."""
        return frozenset(self.stop_token_ids) | (
            frozenset() if self.ignore_eos else frozenset(self.eos_token_ids)
        )

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    @property
    def plain_greedy(self) -> bool:
        """True when the emitted token is the argmax of the raw logits, whatever came before."""
        return (
            self.greedy
            and not self.has_penalties
            and not self.logit_bias
            and not self.allowed_token_ids
            and not self.bad_sequences
            and self.min_tokens == 0
            and self.grammar is None
        )


@dataclass(frozen=True, slots=True)
class DraftSampling:
    """What a drafter needs to guess the token that the target will sample.

    key is the 64-bit noise key of the request (see `actors.sampling.noise`), temperature 0 means greedy.
    `rule` names the verification rule: rules that need q make a sampling drafter ship it.
    """

    key: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    rule: str = "coupled"
