"""The one path from a job to its chunks, shared by HTTP and gRPC, and what both keep of the chunks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from functools import partial

from actors.target_worker.messages import (
    GenerationChunk,
    GenerationRequest,
    PositionLogprobs,
    SpeculationStats,
    Usage,
)
from cluster.gateway.errors import ApiError, from_request_error, internal, not_ready
from cluster.gateway.in_flight import InFlight
from cluster.gateway.models import ServedModel
from cluster.gateway.openai_params import Job
from cluster.gateway.openai_schema import MAX_CHOICES
from cluster.gateway.resume import generate
from cluster.gateway.streams import merged

logger = logging.getLogger(__name__)
QUEUE_CHUNKS = 64
OPEN_CHOICES = MAX_CHOICES
"""Choices of one job at a worker at most, however many its prompts: as many as a single prompt may have. It
keeps a batch full and leaves others more than half of a queue of the default size."""


async def run_job(
    job: Job,
    model: ServedModel,
    in_flight: InFlight,
    *,
    timeout_s: float,
    max_resumes: int,
    on_resume: Callable[[], None] = lambda: None,
) -> AsyncGenerator[tuple[int, GenerationChunk], None]:
    """Yield (prompt index, chunk) of all prompts as they come, resumed where a worker is lost. Of a long list
    a prompt begins when another has ended.

    Closing the generator cancels every request at its worker at once. Raises `ApiError` for an error chunk,
    429 when the queue is full for all prompts that begin first (else a prompt waits for a place), 504 after
    `timeout_s`, 404 once the model is being unloaded, 503 while draining and when resuming `max_resumes`
    times did not help.
    """
    at_once = min(len(job.requests), max(1, OPEN_CHOICES // job.choices_per_prompt))
    refused: set[int] = set()  # of the prompts that begin first, which found the queue full

    def may_wait(index: int) -> bool:
        if index < at_once:
            refused.add(index)
        return len(refused) < at_once

    streams = [
        _reported(generate(model.client, request, max_resumes, on_resume, partial(may_wait, index)), request)
        for index, request in enumerate(job.requests)
    ]
    # A deadline, because a generator may be resumed from another task than the one that began it.
    deadline = time.monotonic() + timeout_s
    with in_flight.track(), model.in_flight.track():
        async with contextlib.aclosing(merged(streams, QUEUE_CHUNKS, at_once)) as chunks:
            while True:
                try:
                    # asyncio.timeout, not wait_for, which may swallow a cancellation (Python 3.11).
                    async with asyncio.timeout(deadline - time.monotonic()):
                        index, chunk = await anext(chunks)
                except StopAsyncIteration:
                    return
                except TimeoutError as error:
                    message = f"the request took longer than {timeout_s:g} s"
                    raise ApiError(504, message, type="timeout", code="timeout") from error
                if chunk.error is not None:
                    raise from_request_error(chunk.error, job.param_names)
                refused.discard(index)
                yield index, chunk


async def _reported(
    chunks: AsyncGenerator[GenerationChunk, None], request: GenerationRequest
) -> AsyncGenerator[GenerationChunk, None]:
    """Logs a failure that no client caused, and raises it as one that clients may see."""
    async with contextlib.aclosing(chunks):
        try:
            async for chunk in chunks:
                yield chunk
        except ApiError:
            raise
        except Exception as error:
            logger.exception("the stream of request %s failed", request.request_id)
            raise internal("the target worker failed") from error


async def prefetch(
    stream: AsyncGenerator[tuple[int, GenerationChunk], None],
) -> AsyncGenerator[tuple[int, GenerationChunk], None]:
    """Wait for the first chunk, so that what is wrong with a request is known before an answer begins.
    The caller goes on owning `stream` and closes it."""
    try:
        first = await anext(stream)
    except StopAsyncIteration as error:
        raise not_ready("the worker ended the stream early; send the request again") from error

    async def resumed() -> AsyncGenerator[tuple[int, GenerationChunk], None]:
        yield first
        async for item in stream:
            yield item

    return resumed()


def add_usage(left: Usage | None, right: Usage | None) -> Usage | None:
    if left is None or right is None:
        return right if left is None else left
    return Usage(
        left.prompt_tokens + right.prompt_tokens,
        left.completion_tokens + right.completion_tokens,
        left.cached_tokens + right.cached_tokens,
    )


@dataclass
class ChoiceResult:
    """All that one choice has emitted so far."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_token_ids: tuple[int, ...] | None = None
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, chunk: GenerationChunk) -> None:
        self.text += chunk.text
        self.token_ids.extend(chunk.token_ids)
        self.logprobs.extend(chunk.logprobs or ())
        self.prompt_token_ids = chunk.prompt_token_ids or self.prompt_token_ids
        self.prompt_logprobs = chunk.prompt_logprobs or self.prompt_logprobs
        if chunk.finish_reason is not None:
            self.finish_reason = chunk.finish_reason
            self.stop_reason = chunk.stop_reason


@dataclass
class JobTotals:
    """Usage and speculation over a whole job. Speculation is reported for a single choice only. `usage`
    covers the choices that have ended, `so_far` all."""

    job: Job
    usage: Usage = field(default_factory=lambda: Usage(0, 0))
    so_far: Usage = field(default_factory=lambda: Usage(0, 0))
    speculation: SpeculationStats | None = None

    def add(self, chunk: GenerationChunk) -> None:
        self.usage = add_usage(self.usage, chunk.usage) or self.usage
        emitted = Usage(0, len(chunk.token_ids))
        self.so_far = add_usage(add_usage(self.so_far, chunk.prompt_usage), emitted) or self.so_far
        if chunk.speculation is not None and self.job.choices == 1:
            self.speculation = replace(chunk.speculation)
