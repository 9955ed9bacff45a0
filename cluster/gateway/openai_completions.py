"""Answers of /v1/completions, whole and streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from actors.target_worker.messages import GenerationChunk, PositionLogprobs
from cluster.gateway.errors import ApiError
from cluster.gateway.generation import ChoiceResult, JobTotals
from cluster.gateway.openai_format import (
    chunk_usage,
    completion_logprobs,
    metrics_body,
    now,
    prompt_logprobs_body,
    usage_body,
)
from cluster.gateway.openai_params import Job
from cluster.gateway.sse import DONE, event

Chunks = AsyncIterator[tuple[int, GenerationChunk]]
PromptIds = Sequence[tuple[int, ...] | None]


async def collect(job: Job, chunks: Chunks, answer_id: str, prompt_ids: PromptIds) -> dict[str, Any]:
    """`prompt_ids[i]` are prompt i's ids where they are known; reported when the job asks for token ids."""
    choices = [ChoiceResult() for _ in range(job.choices)]
    totals = JobTotals(job)
    async for prompt_index, chunk in chunks:
        choices[job.choice_index(prompt_index, chunk.index)].add(chunk)
        totals.add(chunk)
    return {
        "id": answer_id,
        "object": "text_completion",
        "created": now(),
        "model": job.model,
        "choices": [
            _choice(job, i, c, prompt_ids[i // job.choices_per_prompt]) for i, c in enumerate(choices)
        ],
        "usage": usage_body(totals.usage),
        "seed": job.seed,
        "metrics": metrics_body(job, totals.speculation),
    }


def _logprobs(job: Job, chunk: GenerationChunk | ChoiceResult) -> dict[str, Any] | None:
    """Of the prompt (with echo) and of what was emitted."""
    if job.requests[0].sampling.logprobs is None:
        return None
    prompt = chunk.prompt_logprobs if job.requests[0].echo else None
    positions: list[PositionLogprobs | None] = [*(prompt or ()), *(chunk.logprobs or ())]
    # The prompt's first token has no entry of its own: its text is what precedes the second one.
    first_end = next((p.text_offset for p in positions if p is not None), len(chunk.text))
    return completion_logprobs(positions, chunk.text[:first_end])


def _choice(job: Job, index: int, result: ChoiceResult, prompt_ids: tuple[int, ...] | None) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": index,
        "text": result.text,
        "logprobs": _logprobs(job, result),
        "finish_reason": result.finish_reason,
        "stop_reason": result.stop_reason,
    }
    if job.return_token_ids:
        choice["token_ids"] = result.token_ids
        choice["prompt_token_ids"] = list(prompt_ids or result.prompt_token_ids or ())
    if job.return_prompt_logprobs:
        choice["prompt_logprobs"] = prompt_logprobs_body(result.prompt_logprobs)
    return choice


async def stream(
    job: Job,
    chunks: Chunks,
    answer_id: str,
    *,
    include_usage: bool,
    continuous_usage: bool,
    prompt_ids: PromptIds,
) -> AsyncGenerator[bytes, None]:
    """Events of a streamed answer. An error after the first chunk becomes an event."""
    head = {
        "id": answer_id,
        "object": "text_completion",
        "created": now(),
        "model": job.model,
        "seed": job.seed,
    }
    totals = JobTotals(job)
    begun: set[int] = set()
    try:
        async for prompt_index, chunk in chunks:
            totals.add(chunk)
            index = job.choice_index(prompt_index, chunk.index)
            choice: dict[str, Any] = {
                "index": index,
                "text": chunk.text,
                "logprobs": _logprobs(job, chunk) if chunk.logprobs or chunk.prompt_logprobs else None,
                "finish_reason": chunk.finish_reason,
                "stop_reason": chunk.stop_reason,
            }
            if job.return_token_ids:
                choice["token_ids"] = list(chunk.token_ids)
                if index not in begun:
                    known = prompt_ids[prompt_index] or chunk.prompt_token_ids or ()
                    choice["prompt_token_ids"] = list(known)
            if job.return_prompt_logprobs and index not in begun:
                choice["prompt_logprobs"] = prompt_logprobs_body(chunk.prompt_logprobs)
            begun.add(index)
            usage = chunk_usage(totals.so_far, include_usage, continuous_usage)
            yield event({**head, "choices": [choice], **usage})
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
