"""Between protobuf messages of `s2d.v1` and the gateway's own types."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import ValidationError

from actors.sampling.params import MAX_LOGPROBS
from actors.target_worker.messages import (
    GenerationChunk,
    PositionLogprobs,
    SpeculationStats,
    TargetInfo,
    TextLogprob,
)
from cluster.gateway.errors import from_validation_error, invalid
from cluster.gateway.models import ServedModel
from cluster.gateway.openai_params import Job, chat_job, completion_job
from cluster.gateway.openai_schema import ChatBody, CompletionBody, TokenizeBody
from protos.s2d.v1 import generation_pb2 as pb

_PLAIN = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "n",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "prompt_logprobs",
    "include_stop_str_in_output",
)
_LISTS = ("stop", "stop_token_ids", "bad_words", "allowed_token_ids")
_SPECULATION = ("enabled", "max_draft_tokens", "force", "drafter", "exit_depth", "verification", "tree")
_GRAMMARS = {
    "json_object": "json_object",
    "json_schema": "json",
    "regex": "regex",
    "choice": "choice",
    "lark": "grammar",
}


def _shared_fields(
    sampling: pb.SamplingParams, speculation: pb.SpeculationParams | None
) -> dict[str, object]:
    """Set fields under the names of the HTTP API, so that one validation serves both."""
    data: dict[str, object] = {name: getattr(sampling, name) for name in _PLAIN if sampling.HasField(name)}
    data |= {name: list(getattr(sampling, name)) for name in _LISTS if getattr(sampling, name)}
    if sampling.logit_bias:
        data["logit_bias"] = {str(k): v for k, v in sampling.logit_bias.items()}
    if sampling.HasField("grammar"):
        kind = sampling.grammar.kind
        if kind not in _GRAMMARS:
            raise invalid("grammar.kind", f"must be one of {', '.join(_GRAMMARS)}")
        values = {"json_object": True, "choice": list(sampling.grammar.choices)}
        data["structured_outputs"] = {_GRAMMARS[kind]: values.get(kind, sampling.grammar.text)}
    if speculation is not None:
        data["speculation"] = {n: getattr(speculation, n) for n in _SPECULATION if speculation.HasField(n)}
    return data


def _logprobs(sampling: pb.SamplingParams) -> int:
    if sampling.logprobs > MAX_LOGPROBS:
        raise invalid("logprobs", f"must be in [0, {MAX_LOGPROBS}]")
    return sampling.logprobs


def generate_job(request: pb.GenerateRequest, info: TargetInfo, job_id: str) -> Job:
    """Raises 400 naming the field."""
    sampling = request.sampling
    data = _shared_fields(sampling, request.speculation if request.HasField("speculation") else None)
    data["model"] = request.model
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise invalid("prompt", "is required: text or token_ids")
    data["prompt"] = request.text if kind == "text" else list(request.token_ids.ids)
    data["echo"] = request.echo
    if sampling.HasField("logprobs"):
        data["logprobs"] = _logprobs(sampling)
    try:
        body = CompletionBody.model_validate(data)
    except ValidationError as error:
        raise from_validation_error(error) from error
    return completion_job(body, info, job_id)


def chat_request_job(request: pb.ChatRequest, info: TargetInfo, job_id: str) -> Job:
    """Raises 400 naming the field."""
    sampling = request.sampling
    data = _shared_fields(sampling, request.speculation if request.HasField("speculation") else None)
    data["model"] = request.model
    data["messages"] = _messages(request.messages)
    if sampling.HasField("logprobs"):
        data |= {"logprobs": True, "top_logprobs": _logprobs(sampling)}
    try:
        body = ChatBody.model_validate(data)
    except ValidationError as error:
        raise from_validation_error(error) from error
    return chat_job(body, info, job_id)


def tokenize_body(request: pb.TokenizeRequest) -> TokenizeBody:
    """Raises 400 naming the field."""
    data: dict[str, object] = {
        name: getattr(request, name)
        for name in ("add_special_tokens", "add_generation_prompt")
        if request.HasField(name)
    }
    if request.messages:
        data["messages"] = _messages(request.messages)
    if request.text or not request.messages:
        data["prompt"] = request.text
    try:
        return TokenizeBody.model_validate(data)
    except ValidationError as error:
        raise from_validation_error(error) from error


def _messages(messages: Iterable[pb.ChatMessage]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def _logprob(entry: TextLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=entry.token_id, logprob=entry.logprob, token=entry.token)


def _position(position: PositionLogprobs | None) -> pb.PositionLogprobs:
    if position is None:
        return pb.PositionLogprobs()
    return pb.PositionLogprobs(chosen=_logprob(position.chosen), top=[_logprob(t) for t in position.top])


def _positions(positions: Sequence[PositionLogprobs | None] | None) -> list[pb.PositionLogprobs]:
    return [_position(p) for p in positions or ()]


def speculation_message(stats: SpeculationStats) -> pb.SpeculationStats:
    return pb.SpeculationStats(
        num_spec_steps=stats.num_spec_steps,
        num_draft_tokens=stats.num_draft_tokens,
        num_accepted_draft_tokens=stats.num_accepted_draft_tokens,
        acceptance_histogram=stats.acceptance_histogram,
        mean_acceptance_length=stats.mean_acceptance_length,
        draft_acceptance_rate=stats.draft_acceptance_rate,
    )


def chunk_message(chunk: GenerationChunk, request_id: str) -> pb.GenerateChunk:
    """Without usage and speculation, which belong to the last chunk of the whole request."""
    return pb.GenerateChunk(
        index=chunk.index,
        text=chunk.text,
        token_ids=chunk.token_ids,
        tokens_per_round=[tokens for tokens, _ in chunk.rounds],
        accepted_per_round=[accepted for _, accepted in chunk.rounds],
        logprobs=_positions(chunk.logprobs),
        finish_reason=chunk.finish_reason or "",
        seed=chunk.seed,
        request_id=request_id,
        prompt_logprobs=_positions(chunk.prompt_logprobs),
    )


def info_message(model: ServedModel) -> pb.ModelInfo:
    info = model.last_info
    if info is None:
        return pb.ModelInfo(id=model.name, ready=model.ready, state=model.state)
    return pb.ModelInfo(
        id=model.name,
        max_model_len=info.max_model_len,
        dtype=info.dtype,
        architecture=info.architecture,
        vocab_size=info.vocab_size,
        ready=model.ready,
        state=model.state,
        backend=info.backend,
        drafters=info.drafters,
    )
