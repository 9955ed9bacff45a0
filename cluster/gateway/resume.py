"""Generation that outlives a target replica: where one is lost, another goes on from the prompt and what was
emitted. Noise depends on seed and position alone, so the text is the one that the first would have written.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from actors.target_worker.messages import GenerationChunk, GenerationRequest
from cluster.gateway.errors import ApiError, from_request_error, not_ready
from cluster.gateway.models import ModelClient
from cluster.gateway.streams import aclose, merged

logger = logging.getLogger(__name__)
FIRST_DELAY_S = 0.25
LONGEST_DELAY_S = 2.0
"""Between a loss and the next try: a router needs a moment to notice that a replica is gone."""
_QUEUE_CHUNKS = 16


@dataclass(slots=True)
class _Choice:
    token_ids: list[int] = field(default_factory=list)
    opened: bool = False
    finished: bool = False


async def generate(
    client: ModelClient,
    request: GenerationRequest,
    max_resumes: int,
    on_resume: Callable[[], None] = lambda: None,
    may_wait: Callable[[], bool] = lambda: False,
) -> AsyncGenerator[GenerationChunk, None]:
    """Chunks of all choices, as `client.generate` yields them. When the worker becomes unavailable, what is
    unfinished is asked for again, `max_resumes` times at most; each time calls `on_resume`. Speculation
    statistics of a resumed choice cover what its last replica emitted.

    A full queue refuses a fresh request, unless `may_wait` says at that moment that it waits for a place. A
    resumed one always waits, for as long as the caller lets it.

    Raises ApiError: 503 when resuming did not help, others as they come.
    """
    choices = [_Choice() for _ in range(request.n)]
    resumes = 0
    while True:
        failure: ApiError = not_ready("the worker ended the stream early; send the request again")
        async with aclosing(_chunks(client, _rest(request, choices), may_wait)) as chunks:
            try:
                async for chunk in chunks:
                    if chunk.error is not None and chunk.error.kind == "unavailable":
                        failure = from_request_error(chunk.error)
                        break
                    _note(choices[chunk.index], chunk)
                    yield chunk
                    if chunk.error is not None:
                        return
            except ApiError as error:
                if error.status != 503:
                    raise
                failure = error
        if all(choice.finished for choice in choices):
            return
        if resumes == max_resumes:
            raise failure
        resumes += 1
        may_wait = _always
        on_resume()
        logger.warning("request %s is resumed (%d): %s", request.request_id, resumes, failure.message)
        await asyncio.sleep(min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** (resumes - 1)))


def _always() -> bool:
    return True


def _note(choice: _Choice, chunk: GenerationChunk) -> None:
    choice.opened = True
    choice.token_ids.extend(chunk.token_ids)
    choice.finished = chunk.finish_reason is not None


def _rest(request: GenerationRequest, choices: Sequence[_Choice]) -> list[GenerationRequest]:
    """What is still to be done: the request itself, or one request for each unfinished choice."""
    if not any(choice.opened for choice in choices):
        return [request]
    # What concerns the prompt came with a choice's first chunk.
    sampling = replace(request.sampling, prompt_logprobs=None)
    return [
        replace(
            request, n=1, first_choice=index, sampling=sampling, output_ids_so_far=tuple(choice.token_ids)
        )
        if choice.opened
        else replace(request, n=1, first_choice=index)
        for index, choice in enumerate(choices)
        if not choice.finished
    ]


async def _chunks(
    client: ModelClient, requests: Sequence[GenerationRequest], may_wait: Callable[[], bool]
) -> AsyncGenerator[GenerationChunk, None]:
    """Chunks of several requests as they come; the first failure ends all."""
    streams = [_admitted(client, request, may_wait) for request in requests]
    if len(streams) == 1:
        async with aclosing(streams[0]) as chunks:
            async for chunk in chunks:
                yield chunk
        return
    async with aclosing(merged(streams, _QUEUE_CHUNKS, len(streams))) as merger:
        async for _, chunk in merger:
            yield chunk


async def _admitted(
    client: ModelClient, request: GenerationRequest, may_wait: Callable[[], bool]
) -> AsyncGenerator[GenerationChunk, None]:
    """Chunks of one request, which is sent again while the queue is full and `may_wait` holds. Each choice of
    a resumed request waits by itself, so that those with a place go on. The caller bounds the wait."""
    while True:
        stream = client.generate(request)
        try:
            async for chunk in stream:
                if chunk.error is not None and chunk.error.kind == "overloaded" and may_wait():
                    full = from_request_error(chunk.error)
                    break
                yield chunk
            else:
                return
        except ApiError as error:
            if error.status != 429 or not may_wait():
                raise
            full = error
        finally:
            await aclose(stream)
        await asyncio.sleep(full.retry_after_s or LONGEST_DELAY_S)
