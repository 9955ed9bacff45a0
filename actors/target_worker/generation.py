"""One request from prompt to chunks: expand choices, merge their streams, coalesce, report errors."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass

from actors.engine.async_engine import AsyncEngine, EngineUnavailable, OutputStream, Overloaded
from actors.engine.messages import EngineRequest, RequestOutput
from actors.sampling.grammar import GrammarCompiler
from actors.sampling.params import GrammarSpec, ParameterError
from actors.target_worker.messages import GenerationChunk, GenerationRequest, RequestError
from actors.target_worker.output import ChoiceStream, merge
from actors.target_worker.prepare import ModelLimits, prepare
from actors.text.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

_GRAMMAR_THREADS = 2
"""Grammars compiled at a time. They compete with the model for cores, and have threads of their own so that a
burst of them does not hold up the tokenising of long prompts."""


@dataclass(frozen=True, slots=True)
class StreamInterval:
    """How far apart chunks of one choice are at least: `least_ms`, and `per_stream_ms` for every request that
    is inside, whichever is more."""

    least_ms: float
    per_stream_ms: float = 0.0

    def seconds(self, streams: int) -> float:
        return max(self.least_ms, streams * self.per_stream_ms) / 1000.0


class GenerationService:
    """Serves `GenerationRequest`s with an engine.

    A choice's first chunk leaves at once; later ones after each round, or `interval` after the chunk before,
    whichever is later; the last at once. The engine is asked to hold its outputs back likewise.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        engine: AsyncEngine,
        limits: ModelLimits,
        interval: StreamInterval,
        grammars: GrammarCompiler,
    ) -> None:
        """`grammars` is the engine's too, which finds ready what is compiled here, in a thread: a first
        compilation takes up to seconds and must not hold up the engine's running streams."""
        self._tokenizer = tokenizer
        self._engine = engine
        self._limits = limits
        self._interval = interval
        self._grammars = grammars
        self._grammar_threads = ThreadPoolExecutor(_GRAMMAR_THREADS, thread_name_prefix="grammar")
        self._serial = itertools.count()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        """Chunks of all choices. Closing the iterator, or cancelling its consumer, aborts every choice.

        Whatever goes wrong arrives as a last chunk with `error`.
        """
        stream: OutputStream | None = None
        try:
            if request.n > self._engine.capacity:
                raise ParameterError("n", f"must be at most {self._engine.capacity}, this model's queue")
            prompt, sampling = await prepare(request, self._tokenizer, self._limits)
            if sampling.grammar is not None:
                await self._compile(sampling.grammar)
            serial = next(self._serial)  # clients may repeat a request id; the engine's must be unique
            so_far = request.output_ids_so_far
            choices: dict[str, ChoiceStream] = {}
            engine_requests: list[EngineRequest] = []
            for index in range(request.first_choice, request.first_choice + request.n):
                engine_id = f"{request.request_id}-{serial}-{index}"
                choice = ChoiceStream(
                    self._tokenizer, index, prompt, sampling, request.stop, so_far, request.include_stop
                )
                if choice.finished or (sampling.max_tokens == 0 and sampling.prompt_logprobs is None):
                    yield choice.push(RequestOutput(engine_id, finish_reason="length"))
                    continue
                choices[engine_id] = choice
                # The engine stops by itself but for stop strings, which are looked for here.
                interval_s = 0.0 if request.stop else self._interval.seconds(0)
                engine_requests.append(
                    EngineRequest(
                        engine_id, prompt.ids, sampling, request.speculation, index, so_far or (), interval_s
                    )
                )
            stream = self._engine.submit(engine_requests)
            async with aclosing(self._chunks(stream, choices)) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        except ParameterError as bad:
            error = RequestError("invalid", str(bad), param=bad.param)
        except Overloaded as full:
            error = RequestError("overloaded", str(full), retry_after_s=full.retry_after_s)
        except EngineUnavailable as gone:
            error = RequestError("unavailable", str(gone))
        except Exception as bug:
            logger.exception("request %s failed", request.request_id)
            error = RequestError("internal", f"{type(bug).__name__}: {bug}")
        finally:
            if stream is not None:
                stream.close()
        yield GenerationChunk(error=error)

    async def _compile(self, spec: GrammarSpec) -> None:
        """Raises ParameterError."""
        if not self._grammars.ready(spec):
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._grammar_threads, self._grammars.compile, spec)

    async def _chunks(
        self, stream: OutputStream, choices: dict[str, ChoiceStream]
    ) -> AsyncGenerator[GenerationChunk, None]:
        pending: dict[str, GenerationChunk] = {}
        due = dict.fromkeys(choices, 0.0)
        while stream.open:
            timeout = min(due[i] for i in pending) - time.monotonic() if pending else None
            output = await stream.get(timeout)
            now = time.monotonic()
            ready: list[str] = []
            if output is not None:
                choice, request_id = choices[output.request_id], output.request_id
                pending[request_id] = merge(pending.get(request_id), choice.push(output))
                if choice.finished:
                    stream.abort(request_id)  # a stop string ends it here; the engine may not have stopped
                if choice.finished or due[request_id] == 0.0:
                    ready.append(request_id)
            if not stream.ready:  # a slow reader gets what has piled up in one chunk
                ready.extend(i for i in pending if due[i] <= now and i not in ready)
            for request_id in ready:
                chunk = pending.pop(request_id)
                if chunk.token_ids:
                    due[request_id] = now + self._interval.seconds(self._engine.live)
                yield chunk
                if chunk.error is not None:
                    return
