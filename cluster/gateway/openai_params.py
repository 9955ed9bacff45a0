"""From a validated body to what the workers understand. The only place where defaults are applied."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from actors.sampling.params import GrammarSpec, ParameterError, SamplingParams, SpeculationParams
from actors.target_worker.messages import GenerationRequest, TargetInfo
from actors.text.messages import ChatMessage
from cluster.gateway.errors import ApiError, from_parameter_error, invalid
from cluster.gateway.openai_schema import (
    ChatBody,
    CompletionBody,
    MessageBody,
    ResponseFormat,
    SamplingBody,
    SpeculationBody,
    StructuredOutputs,
)

DEFAULT_COMPLETION_TOKENS = 16
SEED_BITS = 53
"""Drawn seeds fit a double, so that a JavaScript client can send one back unchanged."""


def random_seed() -> int:
    return secrets.randbits(SEED_BITS)


@dataclass(frozen=True)
class Job:
    """Everything one API call asks of a model: one `GenerationRequest` a prompt, all with the same seed.

    `param_names` maps internal field names to the public ones, for errors found by the worker.
    """

    job_id: str
    model: str
    seed: int
    requests: tuple[GenerationRequest, ...]
    return_token_ids: bool = False
    return_prompt_logprobs: bool = False
    """As a field of their own, beside those that `echo` puts before the answer's."""
    param_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def choices_per_prompt(self) -> int:
        return self.requests[0].n

    @property
    def choices(self) -> int:
        return len(self.requests) * self.choices_per_prompt

    def choice_index(self, prompt_index: int, choice: int) -> int:
        return prompt_index * self.choices_per_prompt + choice


def grammar_of(
    response_format: ResponseFormat | None, structured: StructuredOutputs | None
) -> tuple[GrammarSpec | None, str]:
    """The constraint, and the public name of the field that asked for it."""
    constrained = response_format is not None and response_format.type != "text"
    if constrained and structured is not None:
        raise invalid("structured_outputs", "cannot be combined with response_format")
    if response_format is not None and constrained:
        if response_format.json_schema is None:
            return GrammarSpec("json_object"), "response_format"
        schema = json.dumps(response_format.json_schema.schema_)
        return GrammarSpec("json_schema", schema), "response_format.json_schema.schema"
    if structured is None:
        return None, "response_format"
    if structured.regex is not None:
        return GrammarSpec("regex", structured.regex), "structured_outputs.regex"
    if structured.grammar is not None:
        return GrammarSpec("lark", structured.grammar), "structured_outputs.grammar"
    if structured.choice is not None:
        pattern = "|".join(re.escape(choice) for choice in structured.choice)
        return GrammarSpec("regex", f"({pattern})"), "structured_outputs.choice"
    if structured.json_object:
        return GrammarSpec("json_object"), "structured_outputs.json_object"
    schema = structured.json_ if isinstance(structured.json_, str) else json.dumps(structured.json_)
    return GrammarSpec("json_schema", schema), "structured_outputs.json"


def speculation_of(body: SpeculationBody | None, info: TargetInfo) -> SpeculationParams:
    """Raises 400 for values out of range and for a drafter that the model does not have."""
    if body is None:
        return SpeculationParams()
    given = body.model_dump(exclude_none=True)
    drafter = given.get("drafter")
    if drafter is not None and info.drafters and drafter not in info.drafters:
        raise invalid("speculation.drafter", f"must be one of {', '.join(info.drafters)}")
    try:
        return SpeculationParams(**given)
    except ParameterError as error:
        raise from_parameter_error(error) from error


def max_tokens_of(body: SamplingBody, default: int | None, lowest: int) -> int | None:
    """The limit the client set under either name. Raises 400 when the two names disagree."""
    names = (body.max_tokens, body.max_completion_tokens)
    if None not in names and names[0] != names[1]:
        raise invalid("max_tokens", "differs from max_completion_tokens")
    name = "max_completion_tokens" if body.max_tokens is None else "max_tokens"
    given = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    if given is None:
        return default
    if given < lowest:
        raise invalid(name, "must not be negative" if given < 0 else f"must be at least {lowest}")
    return given


def sampling_of(
    body: SamplingBody,
    *,
    seed: int,
    max_tokens: int | None,
    grammar: GrammarSpec | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """`max_tokens` None leaves the limit to the worker. Raises 400 naming the field."""
    defaults = SamplingParams()
    min_tokens = body.min_tokens if body.min_tokens is not None else 0

    def given(name: str) -> float:
        value = getattr(body, name)
        return float(getattr(defaults, name) if value is None else value)

    try:
        return SamplingParams(
            max_tokens=max_tokens if max_tokens is not None else max(defaults.max_tokens, min_tokens),
            min_tokens=min_tokens,
            temperature=given("temperature"),
            top_p=given("top_p"),
            top_k=0 if body.top_k in (None, -1) else body.top_k,
            min_p=given("min_p"),
            seed=seed,
            logit_bias=body.logit_bias,
            allowed_token_ids=tuple(body.allowed_token_ids or ()),
            presence_penalty=given("presence_penalty"),
            frequency_penalty=given("frequency_penalty"),
            repetition_penalty=given("repetition_penalty"),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=grammar,
        )
    except ParameterError as error:
        raise from_parameter_error(error) from error


def check_token_ids(ids: tuple[int, ...], param: str, info: TargetInfo) -> None:
    """Raises 400 for ids that are not in the model's vocabulary."""
    if ids and max(ids) >= info.vocab_size:
        raise invalid(param, f"token ids must be below {info.vocab_size}")


def check_vocabulary(sampling: SamplingParams, info: TargetInfo) -> None:
    check_token_ids(tuple(sampling.logit_bias), "logit_bias", info)
    check_token_ids(sampling.stop_token_ids, "stop_token_ids", info)
    check_token_ids(sampling.allowed_token_ids, "allowed_token_ids", info)


def chat_messages(messages: list[MessageBody]) -> tuple[ChatMessage, ...]:
    return tuple(ChatMessage("system" if m.role == "developer" else m.role, m.content) for m in messages)


def _names(grammar_name: str) -> dict[str, str]:
    """Workers call every constraint by one name."""
    return {"grammar": grammar_name, "response_format": grammar_name}


def _job(
    body: SamplingBody,
    info: TargetInfo,
    job_id: str,
    seed: int,
    requests: tuple[GenerationRequest, ...],
    names: Mapping[str, str],
) -> Job:
    return Job(
        job_id, info.id, seed, requests, bool(body.return_token_ids), body.prompt_logprobs is not None, names
    )


def chat_job(body: ChatBody, info: TargetInfo, job_id: str) -> Job:
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "requires logprobs to be true")
    grammar, grammar_name = grammar_of(body.response_format, body.structured_outputs)
    seed = random_seed() if body.seed is None else body.seed
    max_tokens = max_tokens_of(body, None, lowest=1)
    try:
        sampling = sampling_of(
            body,
            seed=seed,
            max_tokens=max_tokens,
            grammar=grammar,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
        )
    except ApiError as error:
        if error.param == "logprobs":
            error.param = "top_logprobs"
        raise
    check_vocabulary(sampling, info)
    request = GenerationRequest(
        request_id=job_id,
        sampling=sampling,
        messages=chat_messages(body.messages),
        max_tokens=max_tokens,
        n=body.choices,
        stop=body.stop,
        include_stop=bool(body.include_stop_str_in_output),
        bad_words=body.bad_words,
        speculation=speculation_of(body.speculation, info),
    )
    names = _names(grammar_name) | {"prompt": "messages"}
    return _job(body, info, job_id, seed, (request,), names)


def completion_job(body: CompletionBody, info: TargetInfo, job_id: str) -> Job:
    grammar, grammar_name = grammar_of(body.response_format, body.structured_outputs)
    seed = random_seed() if body.seed is None else body.seed
    max_tokens = max_tokens_of(body, DEFAULT_COMPLETION_TOKENS, lowest=0 if body.echo else 1)
    prompt_logprobs = body.prompt_logprobs
    if body.echo and body.logprobs is not None:  # they begin with the prompt's
        if prompt_logprobs not in (None, body.logprobs):
            raise invalid("prompt_logprobs", "differs from logprobs, which echo extends to the prompt")
        prompt_logprobs = body.logprobs
    sampling = sampling_of(
        body,
        seed=seed,
        max_tokens=max_tokens,
        grammar=grammar,
        logprobs=body.logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    check_vocabulary(sampling, info)
    speculation = speculation_of(body.speculation, info)
    requests = []
    for index, prompt in enumerate(body.prompt):
        if not isinstance(prompt, str):
            check_token_ids(prompt, "prompt", info)
        requests.append(
            GenerationRequest(
                request_id=job_id if len(body.prompt) == 1 else f"{job_id}-{index}",
                sampling=sampling,
                prompt_text=prompt if isinstance(prompt, str) else None,
                prompt_ids=None if isinstance(prompt, str) else prompt,
                max_tokens=max_tokens,
                n=body.choices,
                stop=body.stop,
                include_stop=bool(body.include_stop_str_in_output),
                bad_words=body.bad_words,
                echo=bool(body.echo),
                speculation=speculation,
            )
        )
    return _job(body, info, job_id, seed, tuple(requests), _names(grammar_name))
