"""Answers of /v1/chat/completions, whole and streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from actors.target_worker.messages import GenerationChunk
from cluster.gateway.errors import ApiError
from cluster.gateway.generation import ChoiceResult, JobTotals
from cluster.gateway.openai_format import (
    chat_logprobs,
    chunk_usage,
    metrics_body,
    now,
    prompt_logprobs_body,
    usage_body,
)
from cluster.gateway.openai_params import Job
from cluster.gateway.sse import DONE, event

Chunks = AsyncIterator[tuple[int, GenerationChunk]]


async def collect(
    job: Job, chunks: Chunks, answer_id: str, prompt_ids: tuple[int, ...] | None
) -> dict[str, Any]:
    """`prompt_ids` are reported when the job asks for token ids."""
    choices = [ChoiceResult() for _ in range(job.choices)]
    totals = JobTotals(job)
    async for _, chunk in chunks:
        choices[chunk.index].add(chunk)
        totals.add(chunk)
    body: dict[str, Any] = {
        "id": answer_id,
        "object": "chat.completion",
        "created": now(),
        "model": job.model,
        "choices": [_choice(job, i, c) for i, c in enumerate(choices)],
        "usage": usage_body(totals.usage),
        "seed": job.seed,
        "metrics": metrics_body(job, totals.speculation),
    }
    if job.return_token_ids:
        body["prompt_token_ids"] = list(prompt_ids or choices[0].prompt_token_ids or ())
    if job.return_prompt_logprobs:
        body["prompt_logprobs"] = prompt_logprobs_body(choices[0].prompt_logprobs)
    return body


def _choice(job: Job, index: int, result: ChoiceResult) -> dict[str, Any]:
    wants_logprobs = job.requests[0].sampling.logprobs is not None
    choice: dict[str, Any] = {
        "index": index,
        "message": {"role": "assistant", "content": result.text},
        "logprobs": chat_logprobs(result.logprobs) if wants_logprobs else None,
        "finish_reason": result.finish_reason,
        "stop_reason": result.stop_reason,
    }
    if job.return_token_ids:
        choice["token_ids"] = result.token_ids
    return choice


async def stream(
    job: Job,
    chunks: Chunks,
    answer_id: str,
    *,
    include_usage: bool,
    continuous_usage: bool,
    prompt_ids: tuple[int, ...] | None,
) -> AsyncGenerator[bytes, None]:
    """Events of a streamed answer. An error after the first chunk becomes an event."""
    head = {
        "id": answer_id,
        "object": "chat.completion.chunk",
        "created": now(),
        "model": job.model,
        "seed": job.seed,
    }
    wants_logprobs = job.requests[0].sampling.logprobs is not None
    totals = JobTotals(job)
    begun: set[int] = set()
    try:
        async for _, chunk in chunks:
            totals.add(chunk)
            usage_field = chunk_usage(totals.so_far, include_usage, continuous_usage)
            if chunk.index not in begun:
                begun.add(chunk.index)
                role = _delta(chunk.index, {"role": "assistant", "content": ""})
                first = {**head, "choices": [role], **usage_field}
                if job.return_token_ids:
                    first["prompt_token_ids"] = list(prompt_ids or chunk.prompt_token_ids or ())
                if job.return_prompt_logprobs:
                    first["prompt_logprobs"] = prompt_logprobs_body(chunk.prompt_logprobs)
                yield event(first)
            if not (chunk.text or chunk.token_ids or chunk.finish_reason):
                continue
            choice = _delta(chunk.index, {"content": chunk.text} if chunk.text or chunk.token_ids else {})
            if wants_logprobs and chunk.logprobs:
                choice["logprobs"] = chat_logprobs(chunk.logprobs)
            if job.return_token_ids:
                choice["token_ids"] = list(chunk.token_ids)
            choice["finish_reason"] = chunk.finish_reason
            if chunk.finish_reason is not None:
                choice["stop_reason"] = chunk.stop_reason
            yield event({**head, "choices": [choice], **usage_field})
        if include_usage:
            yield event(
                {
                    **head,
                    "choices": [],
                    "usage": usage_body(totals.usage),
                    "metrics": metrics_body(job, totals.speculation),
                }
            )
    except ApiError as error:
        yield event(error.body())
    yield DONE


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
