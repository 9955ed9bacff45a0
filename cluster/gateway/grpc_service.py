"""The client API over gRPC: the methods of `s2d.v1.GenerationService`.

Methods take a `CallContext`, which both Ray Serve's context and grpc.aio's have. An error sets the status
on the context and the method ends with an empty message: Serve's proxy carries status and trailing metadata
along with messages only, so an exception would lose `retry-after` (and fill the log with tracebacks).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from actors.target_worker.messages import GenerationChunk, TargetInfo
from cluster.gateway.errors import ApiError, body_too_large, invalid, not_ready
from cluster.gateway.generation import JobTotals
from cluster.gateway.grpc_convert import (
    chat_request_job,
    chunk_message,
    generate_job,
    info_message,
    speculation_message,
    tokenize_body,
)
from cluster.gateway.http_app import authorized, unauthorized
from cluster.gateway.models import ServedModel
from cluster.gateway.openai_format import new_id
from cluster.gateway.openai_params import Job, chat_messages, check_token_ids
from cluster.gateway.routes import UNARY_TIMEOUT_S, Gateway
from protos.s2d.v1 import generation_pb2 as pb

M = TypeVar("M", bound=Message)
REQUEST_ID_KEY = "x-request-id"
RETRY_AFTER_KEY = "retry-after"
MAX_REQUEST_ID = 256


class CallContext(Protocol):
    def invocation_metadata(self) -> Any: ...

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...

    def set_trailing_metadata(self, trailing_metadata: Any) -> None: ...


def _metadata(context: CallContext) -> dict[str, str]:
    return {str(k): v for k, v in context.invocation_metadata() if isinstance(v, str)}


def _trailers(request_id: str, extra: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    printable = "".join(c for c in request_id if " " <= c <= "~")[:MAX_REQUEST_ID]
    return [(REQUEST_ID_KEY, printable), *extra]


def set_error(context: CallContext, error: ApiError, request_id: str) -> None:
    """Status, details ("field: message") and, where it helps, `retry-after` in seconds."""
    context.set_code(error.grpc_code)
    context.set_details(str(error))
    retry = error.headers().get("Retry-After")
    context.set_trailing_metadata(_trailers(request_id, [(RETRY_AFTER_KEY, retry)] if retry else ()))


class GenerationServicer:
    """Logic of the service; a Serve deployment or a grpc.aio server calls it."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def _check(self, context: CallContext, request: Message | None = None) -> None:
        """Raises 401, or 413 for a request of more bytes than an HTTP body may have."""
        config = self._gateway.config
        key, limit = config.api_key, config.max_body_bytes
        if key is not None and not authorized(_metadata(context).get("authorization"), key):
            raise unauthorized()
        if request is not None and request.ByteSize() > limit:
            raise body_too_large(limit)

    async def generate(
        self, request: pb.GenerateRequest, context: CallContext
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        async for message in self._run(
            request, context, lambda info: generate_job(request, info, new_id("grpc"))
        ):
            yield message

    async def chat(
        self, request: pb.ChatRequest, context: CallContext
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        async for message in self._run(
            request, context, lambda info: chat_request_job(request, info, new_id("grpc"))
        ):
            yield message

    async def _run(
        self,
        request: pb.GenerateRequest | pb.ChatRequest,
        context: CallContext,
        build: Callable[[TargetInfo], Job],
    ) -> AsyncIterator[pb.GenerateChunk]:
        request_id = request.request_id or _metadata(context).get(REQUEST_ID_KEY) or new_id("req")
        run: AsyncGenerator[tuple[int, GenerationChunk], None] | None = None
        try:
            with self._gateway.counting_refusals(request.model):
                self._check(context, request)
                if not request.model:
                    raise invalid("model", "is required")
                model, info = await self._gateway.directory.ready_model(request.model)
                job = build(info)
            totals = JobTotals(job)
            context.set_trailing_metadata(_trailers(request_id))
            run = self._gateway.run(job, model, request_id)
            unfinished = job.choices
            async for _, chunk in run:
                totals.add(chunk)
                message = chunk_message(chunk, request_id)
                unfinished -= chunk.finish_reason is not None
                if unfinished == 0:
                    message.usage.CopyFrom(_usage(totals))
                    if totals.speculation is not None:
                        message.speculation.CopyFrom(speculation_message(totals.speculation))
                yield message
        except ApiError as error:
            set_error(context, error, request_id)
            yield pb.GenerateChunk(request_id=request_id)
        finally:
            if run is not None:
                await run.aclose()

    async def tokenize(self, request: pb.TokenizeRequest, context: CallContext) -> pb.TokenizeResponse:
        async def answer() -> pb.TokenizeResponse:
            body = tokenize_body(request)
            model, info = await self._ready(request.model)
            async with asyncio.timeout(UNARY_TIMEOUT_S):
                if body.messages is None:
                    ids = await model.client.tokenize(body.prompt or "", body.add_special_tokens)
                else:
                    messages = chat_messages(body.messages)
                    ids = await model.client.render_ids(messages, body.add_generation_prompt)
            return pb.TokenizeResponse(token_ids=ids, count=len(ids), max_model_len=info.max_model_len)

        return await self._unary(request, context, answer, pb.TokenizeResponse())

    async def detokenize(self, request: pb.DetokenizeRequest, context: CallContext) -> pb.DetokenizeResponse:
        async def answer() -> pb.DetokenizeResponse:
            model, info = await self._ready(request.model)
            check_token_ids(tuple(request.token_ids), "token_ids", info)
            async with asyncio.timeout(UNARY_TIMEOUT_S):
                return pb.DetokenizeResponse(text=await model.client.detokenize(tuple(request.token_ids)))

        return await self._unary(request, context, answer, pb.DetokenizeResponse())

    async def _ready(self, name: str) -> tuple[ServedModel, TargetInfo]:
        """The model named, or the only one. Raises 400, 404 or 503."""
        return await self._gateway.directory.ready_model(self._gateway.named(name or None).name)

    async def _unary(
        self, request: Message, context: CallContext, answer: Callable[[], Awaitable[M]], empty: M
    ) -> M:
        """The answer; `empty` with a status where there is none."""
        request_id = _metadata(context).get(REQUEST_ID_KEY) or new_id("req")
        try:
            self._check(context, request)
            return await answer()
        except ApiError as error:
            set_error(context, error, request_id)
        except TimeoutError:
            set_error(context, not_ready("the target worker did not answer in time"), request_id)
        return empty

    async def list_models(self, context: CallContext) -> pb.ListModelsResponse:
        try:
            self._check(context)
        except ApiError as error:
            set_error(context, error, new_id("req"))
            return pb.ListModelsResponse()
        models = self._gateway.directory.all()
        return pb.ListModelsResponse(models=[info_message(m) for m in models])

    async def get_model_info(self, request: pb.GetModelInfoRequest, context: CallContext) -> pb.ModelInfo:
        try:
            self._check(context, request)
            model = self._gateway.directory.find(request.model)
        except ApiError as error:
            set_error(context, error, new_id("req"))
            return pb.ModelInfo()
        return info_message(model)


def _usage(totals: JobTotals) -> pb.Usage:
    usage = totals.usage
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )
