"""The OpenAI-compatible HTTP API in front of fake targets."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.sampling.params import GrammarSpec, SamplingParams, SpeculationParams
from actors.target_worker.messages import GenerationChunk, GenerationRequest, RequestError, Usage
from actors.text.messages import ChatMessage
from cluster.config import EngineConfig
from cluster.gateway.admin import MetricsReader
from cluster.gateway.errors import not_ready
from cluster.gateway.http_app import build_http_app
from cluster.gateway.openai_params import completion_job
from cluster.gateway.openai_schema import MAX_CHOICES, ChatBody, CompletionBody, SpeculationBody
from cluster.gateway.routes import TOKENIZED_AT_ONCE, Gateway
from cluster.telemetry import collect
from tests.unit.fake_target import MODEL, SPECULATION_FIELDS, FakeTarget, gateway, info, logprob, refuse

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": MODEL, "prompt": "hi"}


async def no_metrics() -> str:
    return "# TYPE s2d_x counter\ns2d_x 1\n"


def client_of(served: Gateway, read_metrics: MetricsReader = no_metrics) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(build_http_app(served, read_metrics), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.fixture
def target() -> FakeTarget:
    return FakeTarget()


@pytest.fixture
async def client(target: FakeTarget) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(gateway(target, admin_endpoints=True, max_body_bytes=4096)) as http:
        yield http


def events(body: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def post(client: httpx.AsyncClient, path: str, body: object, **more: Any) -> httpx.Response:
    return await client.post(path, content=json.dumps(body), **more)


async def refused(
    client: httpx.AsyncClient, path: str, body: object, param: str | None, status: int = 400
) -> Any:
    response = await post(client, path, body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    return error


async def test_models(client: httpx.AsyncClient) -> None:
    await client.get("/ready")
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    one = (await client.get(f"/v1/models/{MODEL}")).json()
    assert listed["data"] == [one]
    assert (one["id"], one["object"], one["max_model_len"], one["dtype"]) == (MODEL, "model", 128, "float32")
    assert {"created", "owned_by"} <= one.keys()
    missing = await client.get("/v1/models/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_chat_answer(client: httpx.AsyncClient, target: FakeTarget) -> None:
    body = (await post(client, "/v1/chat/completions", {**CHAT, "seed": 7})).json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["seed"] == 7
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "abcd"}
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert body["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 4,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    stats = body["metrics"]["speculative_decoding"]
    assert stats["acceptance_histogram"] == [0, 2]
    assert (stats["mean_acceptance_length"], stats["draft_acceptance_rate"]) == (2.0, 0.5)
    assert (stats["num_spec_steps"], stats["num_draft_tokens"]) == (2, 4)
    assert stats["num_accepted_draft_tokens"] == 2
    assert body["metrics"]["drafters"] == {
        "toy": {"num_draft_tokens": 1, "num_accepted_draft_tokens": 1},
        "nested@4": {"num_draft_tokens": 3, "num_accepted_draft_tokens": 1},
    }
    assert "token_ids" not in choice
    assert target.requests[0].max_tokens is None


async def test_drawn_seeds_differ_and_are_reported(client: httpx.AsyncClient, target: FakeTarget) -> None:
    seeds = {(await post(client, "/v1/completions", TEXT)).json()["seed"] for _ in range(4)}
    assert len(seeds) == 4
    assert {r.sampling.seed for r in target.requests} == seeds


async def test_chat_stream(client: httpx.AsyncClient) -> None:
    body = {**CHAT, "stream": True, "n": 2, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}
    response = await post(client, "/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response.text)
    for index, text in ((0, "abcd"), (1, "bcde")):
        mine = [c for c in chunks if c["choices"] and c["choices"][0]["index"] == index]
        assert mine[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert bytes(mine[0]["prompt_token_ids"]) == b"<user>hi<assistant>"
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in mine) == text
        assert [i for c in mine for i in c["choices"][0].get("token_ids", [])] == [ord(t) for t in text]
        assert [c["choices"][0]["finish_reason"] for c in mine][-2:] == [None, "length"]
        tops = mine[1]["choices"][0]["logprobs"]["content"][0]
        assert tops["bytes"] == [ord(text[0])]
        assert len(tops["top_logprobs"]) == 2
    assert all(c["usage"] is None for c in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    assert chunks[-1]["metrics"] is None
    assert len({c["id"] for c in chunks}) == 1


async def test_stream_without_usage_has_none(client: httpx.AsyncClient) -> None:
    chunks = events((await post(client, "/v1/chat/completions", {**CHAT, "stream": True})).text)
    assert all("usage" not in c for c in chunks)
    assert all(c["choices"] for c in chunks)


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_usage_so_far_in_every_chunk(client: httpx.AsyncClient, path: str, include: bool) -> None:
    options = {"continuous_usage_stats": True, "include_usage": include, "include_obfuscation": False}
    base = CHAT if "chat" in path else TEXT
    chunks = events((await post(client, path, {**base, "stream": True, "stream_options": options})).text)
    assert [c["choices"] == [] for c in chunks] == [False] * (len(chunks) - include) + [True] * include
    emitted = 0
    for chunk in chunks:
        for choice in chunk["choices"]:
            emitted += bool(choice.get("text") or choice.get("delta", {}).get("content"))
        # The first event of a chat answer has no text yet, though its chunk has.
        empty = chunk["choices"] and chunk["choices"][0].get("delta") == {"role": "assistant", "content": ""}
        usage = chunk["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (5, emitted + bool(empty))
        assert usage["total_tokens"] == 5 + usage["completion_tokens"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
    assert emitted == 4


@pytest.mark.parametrize("stream", [True, False])
async def test_prompt_logprobs(client: httpx.AsyncClient, stream: bool) -> None:
    expected = [None, {"82": {"logprob": -9999.0, "rank": None, "decoded_token": "R"}}]
    body = {"prompt_logprobs": 0, "logprobs": 0, "n": 2, "stream": stream}
    answer = (await post(client, "/v1/completions", {**TEXT, **body})).text
    events_of = events(answer) if stream else [json.loads(answer)]
    choices = [choice for event in events_of for choice in event["choices"]]
    found = [c["prompt_logprobs"] for c in choices if "prompt_logprobs" in c]
    assert found == [expected, expected]
    assert choices[0]["logprobs"]["tokens"][0] == "a"  # they are not among those of the answer
    answer = (
        await post(client, "/v1/chat/completions", {**CHAT, "prompt_logprobs": 0, "stream": stream})
    ).text
    first, *rest = events(answer) if stream else [json.loads(answer)]
    assert first["prompt_logprobs"] == expected
    assert not any("prompt_logprobs" in event for event in rest)
    without = (await post(client, "/v1/completions", {**TEXT, "echo": True, "logprobs": 1})).json()
    assert "prompt_logprobs" not in without["choices"][0]


async def test_alternatives_of_the_prompt_are_ranked(client: httpx.AsyncClient, target: FakeTarget) -> None:
    position = logprob(66, -1.5, count=3)  # the second of its alternatives
    target.script = lambda request: [
        GenerationChunk(prompt_logprobs=(None, position), finish_reason="length", usage=Usage(2, 0))
    ]
    choice = (await post(client, "/v1/completions", {**TEXT, "prompt_logprobs": 3})).json()["choices"][0]
    assert {i: e["rank"] for i, e in choice["prompt_logprobs"][1].items()} == {"65": 1, "66": 2, "67": 3}


async def test_prompt_logprobs_are_those_of_echo(client: httpx.AsyncClient, target: FakeTarget) -> None:
    body = {**TEXT, "echo": True, "logprobs": 1}
    await refused(client, "/v1/completions", {**body, "prompt_logprobs": 2}, "prompt_logprobs")
    choice = (await post(client, "/v1/completions", {**body, "prompt_logprobs": 1})).json()["choices"][0]
    assert len(choice["prompt_logprobs"]) == 2
    assert choice["logprobs"]["token_logprobs"][:2] == [None, -9999.0]
    await post(client, "/v1/completions", {**TEXT, "echo": True, "prompt_logprobs": 2})
    assert target.requests[-1].sampling.prompt_logprobs == 2


async def test_metrics_on_last_chunk(client: httpx.AsyncClient) -> None:
    body = {**TEXT, "stream": True, "stream_options": {"include_usage": True}}
    chunks = events((await post(client, "/v1/completions", body)).text)
    assert chunks[-1]["metrics"]["speculative_decoding"]["num_spec_steps"] == 2
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == "abcd"


async def test_prompt_lists(client: httpx.AsyncClient, target: FakeTarget) -> None:
    body = {"model": MODEL, "prompt": ["x", [5, 6]], "n": 2, "max_tokens": 3, "return_token_ids": True}
    answer = (await post(client, "/v1/completions", body)).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in answer["choices"]] == ["abc", "bcd", "abc", "bcd"]
    assert [c["prompt_token_ids"] for c in answer["choices"]] == [[1, 120], [1, 120], [5, 6], [5, 6]]
    assert answer["metrics"] is None
    assert answer["usage"]["completion_tokens"] == 12
    assert {r.sampling.seed for r in target.requests} == {answer["seed"]}
    assert len({r.request_id for r in target.requests}) == 2


@dataclass
class SmallTarget(FakeTarget):
    """Admits all choices of a request or none, as an engine does whose queue holds `capacity`. A prompt that
    is "long" gets there later than others."""

    capacity: int = EngineConfig().max_num_seqs + EngineConfig().max_queued
    inside: int = 0
    most: int = 0

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        if request.prompt_text == "long":
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        if self.inside + request.n > self.capacity:
            yield GenerationChunk(error=RequestError("overloaded", "full", retry_after_s=0.01))
            return
        self.inside += request.n
        self.most = max(self.most, self.inside)
        try:
            async for chunk in super().generate(request):
                yield chunk
        finally:
            self.inside -= request.n


@pytest.mark.parametrize(
    ("prompts", "n", "more"),
    [(512, 1, {}), (100, 3, {}), (3, MAX_CHOICES, {}), (400, 1, {"capacity": 40}), (9, 2, {"capacity": 5})],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_list_of_prompts_may_be_longer_than_the_queue(
    prompts: int, n: int, more: dict[str, Any], stream: bool
) -> None:
    target = SmallTarget(**more)
    body = {"model": MODEL, "prompt": ["x"] * prompts, "n": n, "stream": stream}
    async with client_of(gateway(target)) as http:
        response = await post(http, "/v1/completions", body)
    assert response.status_code == 200, response.text
    texts = [""] * (prompts * n)
    answers = events(response.text) if stream else [response.json()]
    for choice in (choice for answer in answers for choice in answer["choices"]):
        texts[choice["index"]] += choice["text"]
    assert texts == ["".join(chr(97 + k + i) for i in range(4)) for k in range(n)] * prompts
    assert (len(target.requests), target.inside) == (prompts, 0)
    assert target.most <= MAX_CHOICES


async def test_a_full_queue_refuses_a_list_of_prompts_at_once() -> None:
    target = SmallTarget(inside=272)
    async with client_of(gateway(target)) as http:
        assert (await post(http, "/v1/completions", {**TEXT, "prompt": ["a", "b"]})).status_code == 429


async def test_a_list_is_not_refused_because_of_its_own_prompts() -> None:
    target = SmallTarget(capacity=1)
    async with client_of(gateway(target)) as http:
        answer = await post(http, "/v1/completions", {**TEXT, "prompt": ["long", "b"]})
    assert [choice["text"] for choice in answer.json()["choices"]] == ["abcd", "abcd"]
    assert [request.prompt_text for request in target.requests] == ["b", "long"]


async def test_a_prompt_that_waits_for_a_place_waits_no_longer_than_its_request_may() -> None:
    target = SmallTarget(capacity=1, hold=asyncio.Event())
    async with client_of(gateway(target, request_timeout_s=0.05)) as http:
        assert (await post(http, "/v1/completions", {**TEXT, "prompt": ["a", "b"]})).status_code == 504
    assert (len(target.requests), target.running) == (1, 0)


async def test_a_client_that_leaves_also_cancels_prompts_that_have_not_begun() -> None:
    target = SmallTarget(length=500, hold=asyncio.Event())
    body = {**TEXT, "prompt": ["x"] * 400, "stream": True, "max_tokens": 400}
    await call_app(gateway(target), "/v1/completions", body, leave_after=1)
    assert (len(target.requests), target.cancelled, target.running) == (MAX_CHOICES, MAX_CHOICES, 0)


@dataclass
class SlowTokenizer(FakeTarget):
    """Answers for prompt "0" later than for others, and fails for the prompt `broken`."""

    broken: str | None = None
    inside: int = 0
    most: int = 0

    async def tokenize(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            await asyncio.sleep(0.05 if text == "0" else 0.001)
            if text == self.broken:
                raise not_ready("gone")
            return await super().tokenize(text, add_special_tokens)
        finally:
            self.inside -= 1


async def test_ids_of_a_list_of_prompts_are_asked_for_together() -> None:
    target = SlowTokenizer()
    prompts = [str(number) for number in range(3 * TOKENIZED_AT_ONCE)]
    async with client_of(gateway(target)) as http:
        answer = await post(http, "/v1/completions", {**TEXT, "prompt": prompts, "return_token_ids": True})
    ids = [choice["prompt_token_ids"] for choice in answer.json()["choices"]]
    assert ids == [[1, *map(ord, prompt)] for prompt in prompts]
    assert target.most == TOKENIZED_AT_ONCE


async def test_a_prompt_without_ids_fails_its_request_and_ends_the_other_calls() -> None:
    target = SlowTokenizer(broken="7")
    body = {**TEXT, "prompt": [str(number) for number in range(100)], "return_token_ids": True}
    async with client_of(gateway(target)) as http:
        answer = await post(http, "/v1/completions", body)
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "gone")
    assert (target.inside, target.requests) == (0, [])


@pytest.mark.parametrize("prompt", ["x", [1, 2], ["x"], [[1, 2]], ["a", "b"], [[1], [2, 3]]])
async def test_prompt_forms(client: httpx.AsyncClient, target: FakeTarget, prompt: object) -> None:
    response = await post(client, "/v1/completions", {"model": MODEL, "prompt": prompt})
    assert response.status_code == 200
    flat = isinstance(prompt, str) or isinstance(prompt[0], int)  # type: ignore[index]
    assert len(target.requests) == (1 if flat else len(prompt))  # type: ignore[arg-type]


async def test_echo_with_prompt_logprobs(client: httpx.AsyncClient, target: FakeTarget) -> None:
    body = {**TEXT, "echo": True, "max_tokens": 0, "logprobs": 1}
    choice = (await post(client, "/v1/completions", body)).json()["choices"][0]
    assert choice["text"] == "PROMPT"
    assert choice["logprobs"]["token_logprobs"] == [None, -9999.0]
    assert choice["logprobs"]["tokens"][1] == "R"
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert target.requests[0].sampling.prompt_logprobs == 1
    assert target.requests[0].max_tokens == 0


async def test_all_parameters_arrive(client: httpx.AsyncClient, target: FakeTarget) -> None:
    """A field that is new in the schema belongs into the body, with a value that is no default."""
    body = {
        **CHAT,
        "max_completion_tokens": 9,
        "min_tokens": 2,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.1,
        "seed": -(2**63),
        "n": 2,
        "logprobs": True,
        "top_logprobs": 3,
        "stop": ["x", "y"],
        "stop_token_ids": [3],
        "include_stop_str_in_output": True,
        "bad_words": ["b c"],
        "allowed_token_ids": [6, 7],
        "prompt_logprobs": 2,
        "ignore_eos": True,
        "logit_bias": {"5": -1},
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "structured_outputs": {"regex": "[ab]"},
        "return_token_ids": True,
        "speculation": SPECULATION_FIELDS,
        "user": "me",
        "safety_identifier": "a hash",
        "prompt_cache_key": "a key",
        "prompt_cache_retention": "24h",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "modalities": ["text"],
        "tools": None,
    }
    elsewhere = {"max_tokens", "response_format", "stream", "stream_options"}  # other tests have them
    assert ChatBody.model_fields.keys() - body.keys() == elsewhere
    assert SpeculationBody.model_fields.keys() == SPECULATION_FIELDS.keys()
    response = await post(client, "/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    sampling = SamplingParams(
        max_tokens=9, min_tokens=2, temperature=0.0, top_p=0.5, top_k=7, min_p=0.1, seed=-(2**63),
        logit_bias={5: -1.0}, presence_penalty=1.0, frequency_penalty=-1.0, repetition_penalty=1.5,
        stop_token_ids=(3,), ignore_eos=True, logprobs=3, grammar=GrammarSpec("regex", "[ab]"),
        allowed_token_ids=(6, 7), prompt_logprobs=2,
    )  # fmt: skip
    assert target.requests == [
        GenerationRequest(
            target.requests[0].request_id, sampling, messages=(ChatMessage("user", "hi"),), max_tokens=9, n=2,
            stop=("x", "y"), include_stop=True, bad_words=("b c",),
            speculation=SpeculationParams(**SPECULATION_FIELDS),
        )
    ]  # fmt: skip


async def test_content_parts_and_developer(client: httpx.AsyncClient, target: FakeTarget) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    echoed = {"role": "assistant", "content": "ok", "refusal": None, "tool_calls": None}
    messages = [{"role": "developer", "content": "be"}, {"role": "user", "content": parts}, echoed]
    assert (await post(client, "/v1/chat/completions", {**CHAT, "messages": messages})).status_code == 200
    sent = target.requests[0].messages
    assert sent is not None
    assert [(m.role, m.content) for m in sent] == [("system", "be"), ("user", "a\nb"), ("assistant", "ok")]


@pytest.mark.parametrize(
    ("extra", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"a": 1}}}},
            "json_schema",
            '{"a": 1}',
        ),
        ({"structured_outputs": {"regex": "[ab]+"}}, "regex", "[ab]+"),
        ({"structured_outputs": {"grammar": 'start: "x"'}}, "lark", 'start: "x"'),
        ({"structured_outputs": {"choice": ["a.", "b"]}}, "regex", "(a\\.|b)"),
        ({"structured_outputs": {"json": {"type": "object"}}}, "json_schema", '{"type": "object"}'),
        ({"structured_outputs": {"json_object": True}}, "json_object", ""),
    ],
)
async def test_grammars(
    client: httpx.AsyncClient, target: FakeTarget, extra: dict[str, Any], kind: str, text: str
) -> None:
    assert (await post(client, "/v1/chat/completions", {**CHAT, **extra})).status_code == 200
    grammar = target.requests[0].sampling.grammar
    assert grammar is not None
    assert (grammar.kind, grammar.text) == (kind, text)


BAD = [
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 1.5}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
    ({"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 10**400}, "seed"),
    ({"seed": "1"}, "seed"),
    ({"stop": 3}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"bad_words": "x"}, "bad_words"),
    ({"bad_words": ["x", " "]}, "bad_words"),
    ({"bad_words": ["x"] * 129}, "bad_words"),
    ({"bad_words": ["\ud800"]}, "bad_words"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [1000]}, "allowed_token_ids"),
    ({"include_stop_str_in_output": 1}, "include_stop_str_in_output"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_cache_key": 5}, "prompt_cache_key"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"5": 10**400}}, "logit_bias"),
    ({"logit_bias": {"5": -(10**400)}}, "logit_bias"),
    ({"logit_bias": {"1000": 1}}, "logit_bias"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"stream": "yes"}, "stream"),
    ({"store": True}, "store"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"tools": []}, "tools"),
    ({"tool_choice": "none"}, "tool_choice"),
    ({"functions": []}, "functions"),
    ({"best_of": 1}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"audio": {}}, "audio"),
    ({"prediction": {}}, "prediction"),
    ({"surprise": 1}, "surprise"),
    ({"speculation": {"depth": 1}}, "speculation.depth"),
    ({"speculation": {"max_draft_tokens": 99}}, "speculation.max_draft_tokens"),
    ({"speculation": {"force": True}}, "speculation.max_draft_tokens"),
    ({"speculation": {"drafter": "nobody"}}, "speculation.drafter"),
    ({"speculation": {"verification": "hope"}}, "speculation.verification"),
    ({"speculation": {"exit_depth": 0}}, "speculation.exit_depth"),
    ({"speculation": []}, "speculation"),
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
    ),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs.structural_tag"),
    (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "structured_outputs",
    ),
    ({"model": 5}, "model"),
    ({"model": None}, "model"),
]


@pytest.mark.parametrize(("extra", "param"), BAD)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_bad_values(client: httpx.AsyncClient, path: str, extra: dict[str, Any], param: str) -> None:
    base = CHAT if "chat" in path else TEXT
    await refused(client, path, {**base, **extra}, param)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "messages.0.name"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": "x"}, "prompt"),
    ],
)
async def test_bad_chat(client: httpx.AsyncClient, extra: dict[str, Any], param: str) -> None:
    await refused(client, "/v1/chat/completions", {**CHAT, **extra}, param)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1000]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
    ],
)
async def test_bad_completions(client: httpx.AsyncClient, extra: dict[str, Any], param: str) -> None:
    await refused(client, "/v1/completions", {**TEXT, **extra}, param)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b'"x"', b"\xff\xfe\x00", b'{"model": NaN}', b'{"a":' + b"[" * 3000, b"1" * 5000],
)
async def test_bad_json(client: httpx.AsyncClient, content: bytes) -> None:
    response = await client.post("/v1/chat/completions", content=content)
    assert response.status_code in (400, 413), response.text
    assert response.json()["error"]["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_numbers_that_are_not(client: httpx.AsyncClient, number: str) -> None:
    raw = json.dumps(CHAT)[:-1] + f', "temperature": {number}}}'
    response = await client.post("/v1/chat/completions", content=raw)
    assert response.status_code == 400
    assert "not" in response.json()["error"]["message"] or "finite" in response.json()["error"]["message"]


async def test_unknown_model_and_route(client: httpx.AsyncClient) -> None:
    error = await refused(client, "/v1/chat/completions", {**CHAT, "model": "x\ud800"}, "model")
    error = await refused(client, "/v1/chat/completions", {**CHAT, "model": "x"}, "model", 404)
    assert error["code"] == "model_not_found"
    assert (await client.get("/v1/nothing")).json()["error"]["code"] == "not_found"
    assert (await client.get("/v1/chat/completions")).status_code == 405


async def test_body_limit_also_without_content_length(client: httpx.AsyncClient, target: FakeTarget) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b" " * 1000

    response = await client.post("/v1/completions", content=pieces())
    assert response.status_code == 413
    assert (await client.post("/tokenize", content=b" " * 5000)).status_code == 413
    assert target.requests == []


@pytest.mark.parametrize(
    ("kind", "status", "retry"),
    [("overloaded", 429, "4"), ("unavailable", 503, "4"), ("internal", 500, None), ("invalid", 400, None)],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_worker_errors_before_the_first_token(
    client: httpx.AsyncClient, target: FakeTarget, kind: str, status: int, retry: str | None, stream: bool
) -> None:
    target.script = refuse(kind, param="response_format" if kind == "invalid" else None)
    body = {**CHAT, "stream": stream, "structured_outputs": {"regex": "("}}
    response = await post(client, "/v1/chat/completions", body)
    assert response.status_code == status
    assert response.headers.get("retry-after") == retry
    if kind == "invalid":
        assert response.json()["error"]["param"] == "structured_outputs.regex"


async def test_worker_error_in_mid_stream(client: httpx.AsyncClient, target: FakeTarget) -> None:
    target.script = lambda request: [
        GenerationChunk(text="a", token_ids=(97,)),
        GenerationChunk(error=RequestError("unavailable", "gone")),
    ]
    response = await post(client, "/v1/completions", {**TEXT, "stream": True})
    assert response.status_code == 200
    chunks = events(response.text)
    assert chunks[0]["choices"][0]["text"] == "a"
    assert chunks[-1]["error"]["message"] == "gone"


async def test_stream_that_ends_early_is_an_error(client: httpx.AsyncClient, target: FakeTarget) -> None:
    target.script = lambda request: [GenerationChunk(text="a", token_ids=(97,))]
    assert (await post(client, "/v1/completions", TEXT)).status_code == 503
    target.script = lambda request: []
    assert (await post(client, "/v1/completions", {**TEXT, "stream": True})).status_code == 503


async def test_client_bug_is_a_500_without_details(client: httpx.AsyncClient, target: FakeTarget) -> None:
    def broken(request: GenerationRequest) -> list[GenerationChunk]:
        raise RuntimeError("secret")

    target.script = broken
    response = await post(client, "/v1/completions", TEXT)
    assert response.status_code == 500
    assert "secret" not in response.text


async def test_not_ready(client: httpx.AsyncClient, target: FakeTarget) -> None:
    target.alive = False
    for response in (await client.get("/ready"), await post(client, "/v1/completions", TEXT)):
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
    assert (await client.get("/health")).status_code == 200
    target.alive = True
    assert (await client.get("/ready")).status_code == 200
    assert (await post(client, "/v1/completions", TEXT)).status_code == 200


async def test_timeout() -> None:
    target = FakeTarget(hold=asyncio.Event())
    async with client_of(gateway(target, request_timeout_s=0.05)) as http:
        assert (await post(http, "/v1/completions", TEXT)).status_code == 504
        chunks = events((await post(http, "/v1/completions", {**TEXT, "stream": True})).text)
        assert chunks[-1]["error"]["code"] == "timeout"
    assert target.running == 0


async def test_drain() -> None:
    target = FakeTarget(hold=asyncio.Event())
    served = gateway(target)
    async with client_of(served) as http:
        running = asyncio.create_task(post(http, "/v1/completions", TEXT))
        await target.arrived.wait()
        assert await served.in_flight.drain(0.05) == 1
        late = await post(http, "/v1/completions", TEXT)
        assert (late.status_code, "retry-after" in late.headers) == (503, True)
        assert (await http.get("/ready")).status_code == 503
        assert target.hold is not None
        target.hold.set()
        assert (await running).status_code == 200
        assert await served.in_flight.drain(1.0) == 0


async def call_app(served: Gateway, path: str, body: object, leave_after: int) -> list[dict[str, Any]]:
    """Call the application and disconnect once `leave_after` body messages have come."""
    app = build_http_app(served, no_metrics)
    content = json.dumps(body).encode()
    left = asyncio.Event()
    sent: list[dict[str, Any]] = []
    incoming = [{"type": "http.request", "body": content, "more_body": False}]
    if leave_after == 0:
        asyncio.get_running_loop().call_later(0.1, left.set)

    async def receive() -> dict[str, Any]:
        if incoming:
            return incoming.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if sum(m["type"] == "http.response.body" for m in sent) == leave_after:
            left.set()

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1",
        "method": "POST", "path": path, "raw_path": path.encode(), "root_path": "", "scheme": "http",
        "query_string": b"", "headers": [], "client": ("c", 1), "server": ("s", 2), "state": {},
    }  # fmt: skip
    await asyncio.wait_for(app(scope, receive, send), 5)
    return sent


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_client_that_leaves_cancels_its_request(path: str, stream: bool) -> None:
    target = FakeTarget(length=500, hold=asyncio.Event())
    served = gateway(target)
    base = CHAT if "chat" in path else {**TEXT, "prompt": ["a", "b"]}
    body = {**base, "stream": stream, "max_tokens": 400}
    await call_app(served, path, body, leave_after=1 if stream else 0)
    assert target.requests
    assert target.running == 0
    assert target.cancelled == len(target.requests)
    assert served.in_flight.count == 0


Failures = list[tuple[str, str]]


def counted(served: Gateway) -> Failures:
    """(model, reason) of each failure that `served` reports from now on."""
    failures: Failures = []
    served.on_failure = lambda model, reason: failures.append((model, reason))
    return failures


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_each_failure_is_counted_once(path: str) -> None:
    target = FakeTarget()
    served = gateway(target, max_body_bytes=4096, max_resumes=0)
    failures, body = counted(served), CHAT if "chat" in path else TEXT
    async with client_of(served) as http:
        for content in (body, {**body, "stream": True}):  # what succeeds is none
            assert (await post(http, path, content)).status_code == 200
        assert failures == []
        for status, content, expected in (
            (400, [], ("", "invalid")),
            (400, {**body, "tempratur": 1}, (MODEL, "invalid")),
            (413, {**body, "user": "x" * 4100}, ("", "invalid")),
            (404, {**body, "model": "other"}, ("", "not_found")),
            (400, {**body, "speculation": {"drafter": "none such"}}, (MODEL, "invalid")),
        ):
            assert (await post(http, path, content)).status_code == status
            assert failures == [expected]
            failures.clear()
        for kind, expected_reason in (
            ("invalid", "invalid"),
            ("overloaded", "overloaded"),
            ("unavailable", "unavailable"),
            ("internal", "internal"),
        ):
            for stream in (False, True):
                target.script = refuse(kind)
                assert (await post(http, path, {**body, "stream": stream})).status_code >= 400
                assert failures == [(MODEL, expected_reason)]
                failures.clear()
        target.script = lambda request: [
            GenerationChunk(text="a", token_ids=(97,)),
            GenerationChunk(error=RequestError("internal", "gone")),
        ]
        assert events((await post(http, path, {**body, "stream": True})).text)[-1]["error"]
        assert failures == [(MODEL, "internal")]
        failures.clear()
        served.in_flight.draining = True
        assert (await post(http, path, body)).status_code == 503
        assert failures == [(MODEL, "unavailable")]


async def test_timeouts_are_counted_and_calls_without_a_key_are_not() -> None:
    served = gateway(FakeTarget(hold=asyncio.Event()), request_timeout_s=0.05, api_key="k")
    failures = counted(served)
    async with client_of(served) as http:
        assert (await post(http, "/v1/completions", TEXT)).status_code == 401
        assert failures == []
        key = {"Authorization": "Bearer k"}
        assert (await post(http, "/v1/completions", TEXT, headers=key)).status_code == 504
    assert failures == [(MODEL, "timeout")]


@pytest.mark.parametrize("stream", [False, True])
async def test_clients_that_leave_are_counted(stream: bool) -> None:
    served = gateway(FakeTarget(length=500, hold=asyncio.Event()))
    failures = counted(served)
    await call_app(
        served,
        "/v1/completions",
        {**TEXT, "stream": stream, "max_tokens": 100},
        leave_after=1 if stream else 0,
    )
    assert failures == [(MODEL, "cancelled")]


async def test_a_client_that_leaves_with_the_whole_answer_is_not_counted() -> None:
    served = gateway(FakeTarget(length=2))
    failures = counted(served)
    job = completion_job(CompletionBody(model=MODEL, prompt="hi"), info(), "id")
    run = served.run(job, served.directory.find(MODEL), None)
    assert [(await anext(run))[1].finish_reason for _ in range(2)] == [None, "length"]
    await run.aclose()
    assert failures == []


@pytest.mark.parametrize("moment", [0.0, 0.02])
async def test_server_cancelling_the_call_cancels_the_request(moment: float) -> None:
    target = FakeTarget(length=500, hold=asyncio.Event())
    served = gateway(target)
    task = asyncio.create_task(call_app(served, "/v1/completions", {**TEXT, "stream": True}, leave_after=99))
    await target.arrived.wait()
    await asyncio.sleep(moment)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (target.running, served.in_flight.count) == (0, 0)


async def test_tokenize_and_detokenize(client: httpx.AsyncClient) -> None:
    body = (await post(client, "/tokenize", {"model": MODEL, "prompt": "ab"})).json()
    assert body == {"count": 3, "max_model_len": 128, "tokens": [1, 97, 98], "token_strs": None}
    body = (await post(client, "/tokenize", {"prompt": "ab", "add_special_tokens": False})).json()
    assert body["tokens"] == [97, 98]
    assert (await post(client, "/tokenize", {"prompt": ""})).json()["count"] == 1
    messages = [{"role": "user", "content": "x"}]
    body = (await post(client, "/tokenize", {"messages": messages, "add_generation_prompt": False})).json()
    assert bytes(body["tokens"]) == b"<user>x"
    assert (await post(client, "/detokenize", {"tokens": [97, 98]})).json() == {"prompt": "ab"}
    await refused(client, "/tokenize", {"prompt": "x", "messages": messages}, None)
    await refused(client, "/detokenize", {"tokens": [1000]}, "tokens")
    await refused(client, "/detokenize", {"tokens": ["x"]}, "tokens.0")
    await refused(client, "/detokenize", {"model": "x", "tokens": [1]}, "model", 404)


async def test_model_may_be_left_out_only_when_there_is_one() -> None:
    async with client_of(gateway(FakeTarget("a"), FakeTarget("b"))) as http:
        await refused(http, "/tokenize", {"prompt": "x"}, "model")


async def test_state_metrics_reset(client: httpx.AsyncClient, target: FakeTarget) -> None:
    state = (await client.get("/state")).json()
    assert [r["replica_id"] for r in state["models"][0]["replicas"]] == ["replica-1", "replica-2"]
    assert state["models"][0]["replicas"][0]["engine"] == {
        "running": 0,
        "waiting": 0,
        "odd": None,
        "drafted_rounds": 3,
        "drafters": {"toy": {"rounds": 3}},
    }
    assert state["draft_workers"][0]["sessions"] == 0
    assert state["gateway"] == {"in_flight": 0, "draining": False}
    assert state["version"] == version("s2d-serve")
    metrics = await client.get("/metrics")
    assert "s2d_x 1\n" in metrics.text
    counter = f'vllm:spec_decode_num_drafts_total{{model_name="{MODEL}",engine="replica-1"}} 3'
    assert counter in metrics.text
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert (await client.post("/admin/reset")).status_code == 200
    assert (await client.post("/admin/reset?scope=caches")).status_code == 200
    error = await refused(client, "/admin/reset?scope=nothing", {}, "scope")
    assert error["message"] == "scope: input should be 'all' or 'caches'"
    assert target.resets == ["all", "caches"]


async def test_live_counters_do_not_wait_for_ray(target: FakeTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray does not say in time which nodes there are: their metrics are missing, not the engines'."""
    over = threading.Event()
    monkeypatch.setattr(collect, "node_urls", lambda: over.wait(5.0))
    async with client_of(gateway(target), partial(collect.collect, timeout_s=0.05)) as http:
        metrics = await http.get("/metrics")
    over.set()
    assert metrics.status_code == 200
    assert metrics.text.startswith("# HELP vllm:spec_decode_num_drafts_total")


async def test_reset_is_off_by_default() -> None:
    async with client_of(gateway(FakeTarget())) as http:
        assert (await http.post("/admin/reset")).status_code == 404


async def test_request_id(client: httpx.AsyncClient) -> None:
    answer = await client.get("/health", headers={"X-Request-Id": "mine"})
    assert answer.headers.get_list("x-request-id") == ["mine"]
    first, second = await client.get("/health"), await client.get("/v1/nothing")
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


async def test_the_log_joins_the_clients_id_and_ours(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cluster.gateway.routes")
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        caplog.clear()
        answer = await post(client, path, body, headers={"X-Request-Id": "mine"})
        lines = [r.getMessage() for r in caplog.records if r.name == "cluster.gateway.routes"]
        assert lines == [f"request {answer.json()['id']} is the client's 'mine'"]


async def test_api_key() -> None:
    async with client_of(gateway(FakeTarget(), api_key="käse")) as http:
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/ready")).status_code == 200
        for header in (None, "Bearer no", "Basic käse", "Bearer"):
            headers = {"Authorization": header.encode()} if header else {}
            response = await http.get("/v1/models", headers=headers)  # type: ignore[arg-type]
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert "x-request-id" in response.headers
        key = {"Authorization": "Bearer käse".encode()}
        assert (await http.get("/v1/models", headers=key)).status_code == 200  # type: ignore[arg-type]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    "prompt",
    "messages",
    "n",
    "seed",
    "stop",
    "logit_bias",
    "speculation",
    "response_format",
    "logprobs",
    "structured_outputs",
    "stream_options",
    "max_tokens",
    "temperature",
    "metadata",
    "echo",
    "stream",
]


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3), st.booleans())
def test_no_body_is_ever_a_500(extra: dict[str, Any], chat: bool) -> None:
    async def check() -> None:
        async with client_of(gateway(FakeTarget())) as http:
            path, base = ("/v1/chat/completions", CHAT) if chat else ("/v1/completions", TEXT)
            response = await http.post(path, content=json.dumps({**base, **extra}))
            assert response.status_code in (200, 400), response.text

    asyncio.run(check())
