"""What every measurement shares: engines up and down, warm-up, one request with a limit, rotating order."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TypeVar

from cluster.bench.engines.interface import BenchEngine, BenchRequest, BenchResponse

T = TypeVar("T")
START_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 120.0
RESET_TIMEOUT_S = 60.0
WARM_UP_TOKENS = 16
Say = Callable[[str], None]
logger = logging.getLogger(__name__)


class BenchError(RuntimeError):
    """The measurement cannot go on; the message names the engine."""


def rotated(items: Sequence[T], by: int) -> list[T]:
    """The items in the same cyclic order, beginning with another one each time."""
    if not items:
        return []
    shift = by % len(items)
    return [*items[shift:], *items[:shift]]


@asynccontextmanager
async def running(engines: Sequence[BenchEngine], say: Say) -> AsyncIterator[None]:
    """Start engines one after the other, and stop whatever was started, also when starting fails. Interrupted
    while stopping, it ends the engine at hand faster and goes on with the others.

    Raises EngineUnavailableError, and TimeoutError for an engine that does not come up in time.
    """
    begun: list[BenchEngine] = []
    try:
        for engine in engines:
            say(f"starting {engine.name}")
            begun.append(engine)
            async with asyncio.timeout(START_TIMEOUT_S):
                await engine.start()
        yield
    finally:
        interrupted: BaseException | None = None
        for engine in reversed(begun):
            # Whatever goes wrong with one, the others have to be stopped all the same.
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await engine.stop()
            except Exception:
                logger.exception("%s did not stop", engine.name)
            except (asyncio.CancelledError, KeyboardInterrupt) as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted


async def ask(engine: BenchEngine, request: BenchRequest, timeout_s: float) -> BenchResponse:
    """One request; one that takes longer than `timeout_s` is cancelled and reported as failed. An answer that
    has not the tokens that `ignore_eos` asks for has failed too: engines would do different work."""
    started = time.perf_counter()
    try:
        async with asyncio.timeout(timeout_s):
            response = await engine.generate(request)
    except TimeoutError:
        return BenchResponse(request.request_id, started, error=f"took longer than {timeout_s:g} s")
    if request.ignore_eos and response.error is None and response.num_tokens != request.max_tokens:
        response.error = (
            f"gave {response.num_tokens} of {request.max_tokens} tokens: "
            f"ignore_eos has no effect, or the context is full (finish_reason: {response.finish_reason})"
        )
    return response


async def reset(engine: BenchEngine) -> None:
    """Raises BenchError: a measurement with what earlier requests left behind would be wrong."""
    try:
        async with asyncio.timeout(RESET_TIMEOUT_S):
            await engine.reset()
    except Exception as error:
        raise BenchError(f"{engine.name} could not be reset: {error or type(error).__name__}") from error


async def warm_up(
    engine: BenchEngine, requests: Sequence[BenchRequest], timeout_s: float, tokens: int = WARM_UP_TOKENS
) -> None:
    """Run requests at once, cut to a few tokens, and forget them. Raises BenchError when one fails: what
    does not answer now need not be measured."""
    short = [
        replace(request, request_id=f"warm-up-{i}", max_tokens=min(request.max_tokens, tokens))
        for i, request in enumerate(requests)
    ]
    responses = await asyncio.gather(*(ask(engine, r, timeout_s) for r in short))
    failed = next((r.error for r in responses if r.error is not None), None)
    if failed is not None:
        raise BenchError(f"{engine.name}: {failed}")
