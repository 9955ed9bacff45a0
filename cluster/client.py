"""A typed asyncio client of the gRPC API.

    async with S2DClient("localhost:9000") as client:
        async for chunk in client.chat("SmolLM2-135M-Instruct", [("user", "Hello!")], max_tokens=32):
            print(chunk.text, end="")

Leaving a stream early (break, `aclose`, cancellation of the task) cancels the request on the server.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import grpc
from google.protobuf.empty_pb2 import Empty

from protos.s2d.v1 import generation_pb2 as pb
from protos.s2d.v1 import generation_pb2_grpc

T = TypeVar("T")
RETRIED = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED})
MAX_BACKOFF_S = 10.0
CHANNEL_OPTIONS = (("grpc.max_receive_message_length", -1),)
"""gRPC's own limit of 4 MiB is less than the log-probabilities of a long prompt, which one chunk brings."""


class S2DError(Exception):
    """A call that failed. `code` is the gRPC status; `retry_after_s` what the server asked to wait."""

    def __init__(self, code: grpc.StatusCode, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{code.name}: {message}" if message else code.name)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class RetryPolicy:
    """Attempts in all, and the first pause in seconds; pauses double and are spread by up to a half.

    Only calls that have not delivered anything yet are tried again, and only for UNAVAILABLE and
    RESOURCE_EXHAUSTED, after the server's `retry-after` where it gave one.
    """

    attempts: int = 4
    initial_backoff_s: float = 0.2

    def pause_s(self, attempt: int, retry_after_s: float | None) -> float:
        base = retry_after_s if retry_after_s is not None else self.initial_backoff_s * 2.0**attempt
        return min(base, MAX_BACKOFF_S) * random.uniform(1.0, 1.5)


@dataclass(frozen=True)
class Options:
    """Sampling and speculation options in protobuf's terms; see `SamplingParams` in generation.proto.

    Raises TypeError or ValueError for names and types that the messages do not have.
    """

    sampling: pb.SamplingParams = field(default_factory=pb.SamplingParams)
    speculation: pb.SpeculationParams | None = None

    @classmethod
    def of(cls, speculation: Mapping[str, Any] | None = None, **sampling: Any) -> Options:
        given = {name: value for name, value in sampling.items() if value is not None}
        grammar = given.pop("grammar", None)
        message = pb.SamplingParams(**given)
        if grammar is not None:
            message.grammar.CopyFrom(pb.GrammarSpec(**grammar))
        return cls(message, pb.SpeculationParams(**speculation) if speculation is not None else None)


def _to_error(error: grpc.aio.AioRpcError) -> S2DError:
    trailers: Any = error.trailing_metadata()
    retry = dict(trailers or ()).get("retry-after")
    try:
        retry_after_s = float(retry) if isinstance(retry, str) else None
    except ValueError:
        retry_after_s = None
    return S2DError(error.code(), error.details() or "", retry_after_s)


class S2DClient:
    """One channel. `timeout_s` bounds each call, streams included."""

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        application: str = "s2d",
        timeout_s: float = 600.0,
        retry: RetryPolicy | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.address = address
        self._channel = (
            grpc.aio.insecure_channel(address, CHANNEL_OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, CHANNEL_OPTIONS)
        )
        self._stub: Any = generation_pb2_grpc.GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._timeout_s = timeout_s
        self._retry = retry or RetryPolicy()
        self._metadata: list[tuple[str, str]] = [("application", application)]
        if api_key is not None:
            self._metadata.append(("authorization", f"Bearer {api_key}"))

    async def __aenter__(self) -> S2DClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close(None)

    async def generate(
        self,
        model: str,
        prompt: str | Sequence[int],
        *,
        echo: bool = False,
        request_id: str = "",
        speculation: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        """Stream a completion of a text or of token ids. Raises `S2DError`."""
        options = Options.of(speculation, **sampling)
        request = pb.GenerateRequest(
            model=model,
            sampling=options.sampling,
            speculation=options.speculation,
            request_id=request_id,
            echo=echo or None,
        )
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(prompt)
        stream = self._stream(self._stub.Generate, request)
        try:
            async for chunk in stream:
                yield chunk
        finally:
            await stream.aclose()

    async def chat(
        self,
        model: str,
        messages: Sequence[tuple[str, str]],
        *,
        request_id: str = "",
        speculation: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        """Stream an answer to (role, content) messages. Raises `S2DError`."""
        options = Options.of(speculation, **sampling)
        request = pb.ChatRequest(
            model=model,
            messages=_messages(messages),
            sampling=options.sampling,
            speculation=options.speculation,
            request_id=request_id,
        )
        stream = self._stream(self._stub.Chat, request)
        try:
            async for chunk in stream:
                yield chunk
        finally:
            await stream.aclose()

    async def tokenize(self, model: str, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        request = pb.TokenizeRequest(model=model, text=text, add_special_tokens=add_special_tokens)
        response: pb.TokenizeResponse = await self._unary(self._stub.Tokenize, request)
        return tuple(response.token_ids)

    async def tokenize_chat(
        self, model: str, messages: Sequence[tuple[str, str]], add_generation_prompt: bool = True
    ) -> tuple[int, ...]:
        """Ids of (role, content) messages under the model's chat template."""
        request = pb.TokenizeRequest(
            model=model, messages=_messages(messages), add_generation_prompt=add_generation_prompt
        )
        response: pb.TokenizeResponse = await self._unary(self._stub.Tokenize, request)
        return tuple(response.token_ids)

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        request = pb.DetokenizeRequest(model=model, token_ids=token_ids)
        response: pb.DetokenizeResponse = await self._unary(self._stub.Detokenize, request)
        return response.text

    async def list_models(self) -> list[pb.ModelInfo]:
        response: pb.ListModelsResponse = await self._unary(self._stub.ListModels, Empty())
        return list(response.models)

    async def model_info(self, model: str) -> pb.ModelInfo:
        """Raises `S2DError` with NOT_FOUND for an unknown model."""
        info: pb.ModelInfo = await self._unary(self._stub.GetModelInfo, pb.GetModelInfoRequest(model=model))
        return info

    async def _unary(self, method: Callable[..., Awaitable[T]], request: object) -> T:
        for attempt in range(self._retry.attempts):
            try:
                return await method(request, timeout=self._timeout_s, metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                await self._pause_or_raise(_to_error(error), attempt)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _stream(self, method: Any, request: object) -> AsyncGenerator[pb.GenerateChunk, None]:
        for attempt in range(self._retry.attempts):
            call = method(request, timeout=self._timeout_s, metadata=self._metadata)
            delivered = False
            try:
                async for chunk in call:
                    if _is_empty(chunk):  # precedes an error status
                        continue
                    delivered = True
                    yield chunk
                return
            except grpc.aio.AioRpcError as error:
                failure = _to_error(error)
                if delivered:
                    raise failure from error
                await self._pause_or_raise(failure, attempt)
            finally:
                call.cancel()

    async def _pause_or_raise(self, error: S2DError, attempt: int) -> None:
        if error.code not in RETRIED or attempt + 1 >= self._retry.attempts:
            raise error
        await asyncio.sleep(self._retry.pause_s(attempt, error.retry_after_s))


def _messages(messages: Sequence[tuple[str, str]]) -> list[pb.ChatMessage]:
    return [pb.ChatMessage(role=role, content=content) for role, content in messages]


def _is_empty(chunk: pb.GenerateChunk) -> bool:
    return not (chunk.text or chunk.token_ids or chunk.finish_reason or chunk.HasField("seed"))
