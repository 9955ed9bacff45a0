"""Endpoints of the OpenAI-compatible API: /v1/models, chat, completions, tokenize, detokenize."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import Response

from actors.target_worker.messages import GenerationChunk, GenerationRequest, TargetInfo
from cluster.config import GatewayConfig
from cluster.gateway import openai_chat, openai_completions
from cluster.gateway.draft_assignments import draft_assignments
from cluster.gateway.errors import body_too_large, from_validation_error, invalid, not_ready
from cluster.gateway.failures import FailureReason, failure_reason
from cluster.gateway.generation import prefetch, run_job
from cluster.gateway.in_flight import InFlight
from cluster.gateway.models import DraftPoolView, ModelClient, ModelDirectory, ModelLoader, ServedModel
from cluster.gateway.openai_format import new_id
from cluster.gateway.openai_params import (
    Job,
    chat_job,
    chat_messages,
    check_token_ids,
    completion_job,
)
from cluster.gateway.openai_schema import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from cluster.gateway.sse import EventStreamResponse, JsonResponse, until_disconnect
from cluster.gateway.streams import merged

if TYPE_CHECKING:
    from cluster.gateway.router_api import RouterControl

B = TypeVar("B", bound=Body)
J = TypeVar("J", ChatBody, CompletionBody)
logger = logging.getLogger(__name__)
REQUEST_ID = "x-request-id"
DRAIN_BODY_FACTOR = 16
DRAIN_BODY_S = 5.0
UNARY_TIMEOUT_S = 30.0
TOKENIZED_AT_ONCE = 16
"""Prompts of one job whose ids a worker is asked for at the same time."""


@dataclass
class Gateway:
    """What every endpoint needs; HTTP and gRPC share one."""

    config: GatewayConfig
    directory: ModelDirectory
    draft_pool: DraftPoolView
    in_flight: InFlight
    on_resume: Callable[[str], None] = lambda model: None
    """Called with the model's name whenever a request goes on at another replica."""
    on_failure: Callable[[str, FailureReason], None] = lambda model, reason: None
    """Called once for each call for generation that ends without its whole answer, with the model's name;
    with "" where the call names none that is served."""
    router: RouterControl | None = None
    """None where no router runs."""
    loader: ModelLoader | None = None
    """None where models come and go with the application only."""

    async def run(
        self, job: Job, model: ServedModel, client_id: str | None
    ) -> AsyncGenerator[tuple[int, GenerationChunk], None]:
        """As `run_job`. `client_id`: what the client calls the request. The log names it beside the job's id
        once."""
        if client_id:
            # Quoted and cut: it may be any text.
            logger.info("request %s is the client's %.256r", job.job_id, client_id)
        chunks = run_job(
            job,
            model,
            self.in_flight,
            timeout_s=self.config.request_timeout_s,
            max_resumes=self.config.max_resumes,
            on_resume=lambda: self.on_resume(job.model),
        )
        unfinished = job.choices
        try:
            async with aclosing(chunks):
                async for index, chunk in chunks:
                    unfinished -= chunk.finish_reason is not None
                    yield index, chunk
        except BaseException as error:
            if unfinished:  # who leaves with the whole answer lacks nothing
                self._report(job.model, error)
            raise

    @contextmanager
    def counting_refusals(self, model: str = "") -> Iterator[None]:
        """For what comes before `run`: reports what ends the block, of the model that the call names."""
        try:
            yield
        except BaseException as error:
            self._report(model if model in self.directory.names() else "", error)
            raise

    def _report(self, model: str, error: BaseException) -> None:
        reason = failure_reason(error)
        if reason is not None:
            self.on_failure(model, reason)

    def named(self, name: str | None) -> ServedModel:
        """The model asked for; the only one where none is named."""
        chosen = name if name is not None else self.directory.only_name()
        if chosen is None:
            raise invalid("model", "is required when several models are served")
        return self.directory.find(chosen)


async def read_json(request: Request, limit: int) -> Any:
    """The body as JSON. 413 beyond `limit` bytes, 400 for anything that is not strict JSON.

    A body that is too large is read on for a while and thrown away: a client that is still sending would
    otherwise see a reset connection instead of the answer.
    """
    body = bytearray()
    too_large = False
    deadline = asyncio.get_running_loop().time() + DRAIN_BODY_S
    total = 0
    async for chunk in request.stream():
        total += len(chunk)
        too_large = too_large or total > limit
        if not too_large:
            body += chunk
        elif total > DRAIN_BODY_FACTOR * limit or asyncio.get_running_loop().time() > deadline:
            break
    if too_large:
        raise body_too_large(limit)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not allowed")

    try:
        return json.loads(body, parse_constant=refuse)
    except RecursionError as error:
        raise invalid(None, "the body is nested too deeply", code="invalid_json") from error
    except ValueError as error:
        raise invalid(None, f"the body is not valid JSON: {error}", code="invalid_json") from error


async def parse(request: Request, schema: type[B], limit: int) -> B:
    return validated(await read_object(request, limit), schema)


async def read_object(request: Request, limit: int) -> dict[str, Any]:
    data = await read_json(request, limit)
    if not isinstance(data, dict):
        raise invalid(None, "the body must be a JSON object", code="invalid_json")
    return data


def validated(data: Mapping[str, Any], schema: type[B]) -> B:
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise from_validation_error(error) from error
    except RecursionError as error:
        raise invalid(None, "the body is nested too deeply", code="invalid_json") from error


async def model_bodies(gateway: Gateway, models: Sequence[ServedModel]) -> list[dict[str, Any]]:
    drafts = await draft_assignments(gateway.router)
    return [
        model_body(m, m.last_info) | {"draft": None if drafts is None else drafts.get(m.name, [])}
        for m in models
    ]


def model_body(model: ServedModel, info: TargetInfo | None) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "s2d",
        "max_model_len": info.max_model_len if info else None,
        "dtype": info.dtype if info else None,
        "architecture": info.architecture if info else None,
        "backend": info.backend if info else None,
        "drafters": list(info.drafters) if info else [],
        "ready": model.ready,
        "state": model.state,
    }


async def unary(work: Any, request: Request) -> Any:
    """A short call to a worker, cancelled with its client; 503 when the worker does not answer."""
    try:
        async with asyncio.timeout(UNARY_TIMEOUT_S):
            return await until_disconnect(request, work)
    except TimeoutError as error:
        raise not_ready("the target worker did not answer in time") from error


async def known_prompt_ids(job: Job, client: ModelClient) -> list[tuple[int, ...] | None]:
    """Ids of each prompt where the job asks to return them and the worker would not send them."""
    ids: list[tuple[int, ...] | None] = [None] * len(job.requests)
    if not job.return_token_ids:
        return ids

    # As streams of one each: `merged` bounds how many run, and ends all with the first that fails.
    async def answer(request: GenerationRequest) -> AsyncGenerator[tuple[int, ...] | None, None]:
        if request.echo:
            return
        if request.messages is not None:
            yield await client.render_ids(request.messages, True)
        elif request.prompt_text is not None:
            yield await client.tokenize(request.prompt_text, True)
        else:
            yield request.prompt_ids

    calls = [answer(request) for request in job.requests]
    async with aclosing(merged(calls, TOKENIZED_AT_ONCE, TOKENIZED_AT_ONCE)) as answers:
        async for index, prompt_ids in answers:
            ids[index] = prompt_ids
    return ids


async def answer_job(
    gateway: Gateway, request: Request, job: Job, body: ChatBody | CompletionBody
) -> Response:
    """Run a job and answer in the shape of its body's endpoint, streamed or whole."""
    chat = isinstance(body, ChatBody)
    answer_id = job.job_id
    prompt_ids: Sequence[tuple[int, ...] | None]
    with gateway.counting_refusals(job.model):
        model = gateway.directory.find(job.model)
        prompt_ids = await unary(known_prompt_ids(job, model.client), request)
    run = gateway.run(job, model, request.headers.get(REQUEST_ID))
    if not body.stream:
        collected = (
            openai_chat.collect(job, run, answer_id, prompt_ids[0])
            if chat
            else openai_completions.collect(job, run, answer_id, prompt_ids)
        )
        try:
            return JsonResponse(await until_disconnect(request, collected))
        finally:
            await run.aclose()
    try:
        chunks = await until_disconnect(request, prefetch(run))
    except BaseException:
        await run.aclose()
        raise
    usages = {"include_usage": body.include_usage, "continuous_usage": body.continuous_usage}
    events = (
        openai_chat.stream(job, chunks, answer_id, prompt_ids=prompt_ids[0], **usages)
        if chat
        else openai_completions.stream(job, chunks, answer_id, prompt_ids=prompt_ids, **usages)
    )
    return EventStreamResponse(events, on_close=run.aclose)


def build_router(gateway: Gateway) -> APIRouter:
    router = APIRouter()
    limit = gateway.config.max_body_bytes

    @router.get("/v1/models")
    async def list_models() -> Response:
        data = await model_bodies(gateway, gateway.directory.all())
        return JsonResponse({"object": "list", "data": data})

    @router.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> Response:
        (body,) = await model_bodies(gateway, [gateway.directory.find(model_id)])
        return JsonResponse(body)

    async def answer(
        request: Request, schema: type[J], job_of: Callable[[J, TargetInfo, str], Job], prefix: str
    ) -> Response:
        with gateway.counting_refusals():
            data = await read_object(request, limit)
        with gateway.counting_refusals(str(data.get("model", ""))):
            body = validated(data, schema)
            _, info = await gateway.directory.ready_model(body.model)
            job = job_of(body, info, new_id(prefix))
        return await answer_job(gateway, request, job, body)

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, ChatBody, chat_job, "chatcmpl")

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, CompletionBody, completion_job, "cmpl")

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = await parse(request, TokenizeBody, limit)
        model, info = await gateway.directory.ready_model(gateway.named(body.model).name)
        if body.messages is not None:
            work = model.client.render_ids(chat_messages(body.messages), body.add_generation_prompt)
        else:
            work = model.client.tokenize(body.prompt or "", body.add_special_tokens)
        tokens = await unary(work, request)
        answer = {"count": len(tokens), "max_model_len": info.max_model_len, "tokens": list(tokens)}
        return JsonResponse({**answer, "token_strs": None})

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = await parse(request, DetokenizeBody, limit)
        model, info = await gateway.directory.ready_model(gateway.named(body.model).name)
        check_token_ids(tuple(body.tokens), "tokens", info)
        text = await unary(model.client.detokenize(body.tokens), request)
        return JsonResponse({"prompt": text})

    return router
