"""Any OpenAI-compatible endpoint, measured through streamed /v1/completions.

Optional features are tried with short requests at the start: prompt ids instead of text, `return_token_ids`
(vLLM and this server), `ignore_eos`, usage in the stream. What is missing costs accuracy, and `describe` says
so.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from cluster.bench.engines.interface import BenchRequest, BenchResponse, EngineUnavailableError
from cluster.bench.engines.speculation_payload import speculation_counts

CONNECT_TIMEOUT_S = 10.0
PROBE_TIMEOUT_S = 120.0
PROBE_TOKENS = 8
"""Of the answer that shows whether usage runs along; a chunk may hold several."""
_DATA = "data:"
_ERROR_CHARS = 500


@dataclass(slots=True)
class Features:
    """What the endpoint was found to understand."""

    prompt_ids: bool = False
    token_ids: bool = False
    ignore_eos: bool = False
    usage: bool = False
    continuous_usage: bool = False


@dataclass(slots=True)
class _Stream:
    """What a stream has told so far. arrivals: tokens of each chunk, None where the endpoint does not say.
    counted: their sum, where such a chunk counts as one."""

    arrivals: list[tuple[float, int | None]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Mapping[str, Any] | None = None
    metrics: Mapping[str, Any] | None = None
    counted: int = 0


class OpenAIEndpoint:
    """A `BenchEngine` for a running server. It starts and stops nothing there.

    url: with or without /v1. model: None takes the first that the server lists. extra_body: sent with every
    request. reset_path: POSTed to by `reset`; without it `reset` does nothing. extra: goes into `describe`.
    trust_env: whether requests go through the environment's proxy, if it names one.
    """

    def __init__(
        self,
        name: str,
        url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        extra_body: Mapping[str, Any] | None = None,
        reset_path: str | None = None,
        extra: Mapping[str, Any] | None = None,
        trust_env: bool = True,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._name = name
        self._url = url.rstrip("/").removesuffix("/v1")
        self._model = model
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._extra_body = dict(extra_body or {})
        self._reset_path = reset_path
        self._extra = dict(extra or {})
        self._trust_env = trust_env
        self._transport = transport
        self._client: httpx.AsyncClient | None = None
        self.features = Features()
        self._other_prompt_length = 0

    @property
    def name(self) -> str:
        return self._name

    @property
    def pid(self) -> int | None:
        return None

    async def start(self) -> None:
        self._client = httpx.AsyncClient(
            base_url=self._url,
            headers=self._headers,
            transport=self._transport,
            trust_env=self._trust_env,
            # How long a request may take is the caller's business.
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )
        try:
            if self._model is None:
                self._model = await self._first_model()
            await self._probe_all()
        except httpx.HTTPError as error:
            await self.stop()
            raise EngineUnavailableError(
                f"{self._name}: no answer from {self._url}: {error or type(error).__name__}"
            ) from error
        except EngineUnavailableError:
            await self.stop()
            raise

    async def stop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def reset(self) -> None:
        """Raises httpx.HTTPError when the endpoint has a reset route that does not work."""
        if self._reset_path is not None:
            (await self._http.post(self._reset_path)).raise_for_status()

    def describe(self) -> Mapping[str, Any]:
        """other_prompt_length: answers whose usage counts other prompt tokens than were rendered, for example
        because the endpoint adds a beginning-of-sequence token to a text."""
        features = self.features
        return {
            "kind": "openai endpoint",
            "model": self._model,
            "extra_body": self._extra_body,
            "sent": "prompt ids" if features.prompt_ids else "prompt text",
            "token_ids": features.token_ids,
            "ignore_eos": features.ignore_eos,
            "tokens_per_chunk": "reported"
            if features.token_ids or features.continuous_usage
            else "taken as 1",
            "reset": self._reset_path or "none",
            "other_prompt_length": self._other_prompt_length,
            **self._extra,
        }

    async def generate(self, request: BenchRequest) -> BenchResponse:
        if request.ignore_eos and not self.features.ignore_eos:
            refusal = "the endpoint does not support ignore_eos"
            return BenchResponse(request.request_id, time.perf_counter(), error=refusal)
        body = self._body(request)
        stream = _Stream()
        started = time.perf_counter()
        error: str | None = None
        try:
            async for event, at in self._events(body):
                self._take(stream, event, at)
        except (httpx.HTTPError, json.JSONDecodeError, _AnswerError) as failure:
            error = str(failure) or type(failure).__name__
        return self._response(request, started, stream, error)

    @property
    def _http(self) -> httpx.AsyncClient:
        if self._client is None:
            raise RuntimeError(f"{self._name} is not started")
        return self._client

    def _body(self, request: BenchRequest) -> dict[str, Any]:
        features = self.features
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": list(request.prompt_ids) if features.prompt_ids else request.prompt_text,
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
            "stream": True,
        }
        if features.usage:
            body["stream_options"] = {"include_usage": True}
            if features.continuous_usage and not features.token_ids:
                body["stream_options"]["continuous_usage_stats"] = True
        if features.token_ids:
            body["return_token_ids"] = True
        if request.ignore_eos:
            body["ignore_eos"] = True
        return body | self._extra_body

    async def _events(self, body: Mapping[str, Any]) -> AsyncIterator[tuple[dict[str, Any], float]]:
        """Events of a stream with the time at which each arrived. Raises _AnswerError for an error answer."""
        async with self._http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                text = (await answer.aread()).decode("utf-8", "replace")
                raise _AnswerError(f"HTTP {answer.status_code}: {text[:_ERROR_CHARS]}")
            async for line in answer.aiter_lines():
                at = time.perf_counter()
                if not line.startswith(_DATA):
                    continue
                data = line[len(_DATA) :].strip()
                if data == "[DONE]":
                    return
                event = json.loads(data)
                if event.get("error"):
                    raise _AnswerError(str(event["error"])[:_ERROR_CHARS])
                yield event, at

    def _take(self, stream: _Stream, event: Mapping[str, Any], at: float) -> None:
        usage = event.get("usage")
        if usage:
            stream.usage = usage
        stream.metrics = event.get("metrics") or stream.metrics
        for choice in event.get("choices") or ():
            text = choice.get("text") or ""
            ids = choice.get("token_ids")
            stream.finish_reason = choice.get("finish_reason") or stream.finish_reason
            if ids:
                stream.ids.extend(ids)
                count: int | None = len(ids)
            elif self.features.continuous_usage and usage and not self.features.token_ids:
                count = max(0, usage["completion_tokens"] - stream.counted)
            else:
                count = None if text and not self.features.token_ids else 0
            stream.counted += 1 if count is None else count
            stream.text.append(text)
            if count != 0:
                stream.arrivals.append((at, count))

    def _response(
        self, request: BenchRequest, started: float, stream: _Stream, error: str | None
    ) -> BenchResponse:
        usage = stream.usage or {}
        total = usage.get("completion_tokens")
        if total is None and stream.finish_reason == "length":
            total = request.max_tokens
        if error is None and stream.finish_reason is None:
            error = "the stream ended before the answer did"
        prompt_tokens = usage.get("prompt_tokens")
        if prompt_tokens is not None and prompt_tokens != len(request.prompt_ids):
            self._other_prompt_length += 1
        response = BenchResponse(
            request.request_id,
            started,
            _known_counts(stream.arrivals, total),
            tuple(stream.ids) if self.features.token_ids else None,
            "".join(stream.text),
            stream.finish_reason,
            error=error,
        )
        response.speculation = speculation_counts(stream.metrics, response.num_tokens)
        return response

    async def _first_model(self) -> str:
        answer = await self._http.get("/v1/models", timeout=PROBE_TIMEOUT_S)
        models = answer.json().get("data") if answer.status_code == 200 else None
        if not models:
            raise EngineUnavailableError(f"{self._name}: {self._url} lists no models")
        return str(models[0]["id"])

    async def _probe(self, **fields: Any) -> dict[str, Any] | None:
        """The answer to one token with these fields, None when the endpoint refuses them."""
        body = {"model": self._model, "prompt": "Hi", "max_tokens": 1, "temperature": 0.0, **fields}
        answer = await self._http.post("/v1/completions", json=body, timeout=PROBE_TIMEOUT_S)
        if answer.status_code in (400, 404, 422, 501):
            return None
        if answer.status_code != 200:
            raise EngineUnavailableError(
                f"{self._name}: HTTP {answer.status_code}: {answer.text[:_ERROR_CHARS]}"
            )
        return {} if fields.get("stream") else dict(answer.json())

    async def _probe_all(self) -> None:
        if await self._probe() is None:
            raise EngineUnavailableError(
                f"{self._name}: {self._url} has no /v1/completions for {self._model}"
            )
        features = self.features
        features.prompt_ids = await self._probe(prompt=[1, 2]) is not None
        features.ignore_eos = await self._probe(ignore_eos=True) is not None
        told = await self._probe(return_token_ids=True)
        features.token_ids = bool(told and told["choices"] and told["choices"][0].get("token_ids"))
        options: dict[str, Any] = {"include_usage": True}
        features.usage = await self._probe(stream=True, stream_options=options) is not None
        if features.usage and not features.token_ids:
            features.continuous_usage = await self._usage_runs_along()

    async def _usage_runs_along(self) -> bool:
        """Whether the tokens that chunks tell grow from one to the next. That nothing is refused says little:
        many servers take `continuous_usage_stats` and tell the total alone."""
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": "Hi",
            "max_tokens": PROBE_TOKENS,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        if self.features.ignore_eos:
            body["ignore_eos"] = True
        told: set[int] = set()
        try:
            async for event, _ in self._events(body):
                if event.get("choices") and event.get("usage"):
                    told.add(event["usage"]["completion_tokens"])
        except (_AnswerError, json.JSONDecodeError):
            return False
        return len(told) > 1


class _AnswerError(Exception):
    """The endpoint answered with an error."""


def _known_counts(arrivals: list[tuple[float, int | None]], total: int | None) -> list[tuple[float, int]]:
    """A chunk of unknown size counts as one token; what the total has beyond that came with the last chunk,
    so that first to last arrival covers all tokens but the first, as TPOT is usually computed. Where the
    total is less, the last chunks of unknown size held no token of their own."""
    known = [(at, 1 if count is None else count) for at, count in arrivals]
    unknown = [index for index, (_, count) in enumerate(arrivals) if count is None]
    missing = total - sum(count for _, count in known) if total else 0
    if unknown and missing > 0:
        known[-1] = (known[-1][0], known[-1][1] + missing)
    for index in unknown[missing:] if missing < 0 else ():
        known[index] = (known[index][0], 0)
    return known
