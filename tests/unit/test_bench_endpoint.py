"""The driver of OpenAI endpoints: against this gateway, and against servers that can less."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest

from cluster.bench.engines.interface import BenchRequest, EngineUnavailableError
from cluster.bench.engines.openai_endpoint import OpenAIEndpoint
from cluster.gateway.http_app import build_http_app
from tests.unit.fake_target import MODEL, FakeTarget, gateway

REQUEST = BenchRequest("r1", (5, 6, 7, 8, 9), "prompt text", 4, ignore_eos=True, seed=3)
URL = "http://test"


async def no_metrics() -> str:
    return ""


def own(target: FakeTarget, **fields: Any) -> OpenAIEndpoint:
    app = build_http_app(gateway(target, admin_endpoints=True), no_metrics)
    return OpenAIEndpoint("own", f"{URL}/v1/", transport=httpx.ASGITransport(app), **fields)


async def test_against_our_own_gateway() -> None:
    target = FakeTarget()
    engine = own(target, extra_body={"speculation": {"enabled": False}}, reset_path="/admin/reset")
    await engine.start()
    answer = await engine.generate(REQUEST)
    assert answer.error is None
    assert answer.token_ids == (97, 98, 99, 100)
    assert answer.text == "abcd"
    assert [count for _, count in answer.arrivals] == [1, 1, 1, 1]
    assert answer.finish_reason == "length"
    assert answer.speculation is not None
    assert (answer.speculation.drafted, answer.speculation.accepted) == (4, 2)
    assert answer.speculation.accepted_by_position == (2,)
    assert answer.speculation.by_exit == {"toy": (1, 1), "nested@4": (3, 1)}
    asked = target.requests[-1]
    assert asked.prompt_ids == REQUEST.prompt_ids
    assert asked.sampling.ignore_eos
    assert asked.sampling.seed == 3
    assert not asked.speculation.enabled
    await engine.reset()
    assert target.resets == ["all"]
    assert engine.describe()["sent"] == "prompt ids"
    assert engine.describe()["model"] == MODEL
    await engine.stop()


async def test_refused_and_broken_answers_are_reported() -> None:
    target = FakeTarget()
    engine = own(target)
    await engine.start()
    refused = await engine.generate(replace(REQUEST, prompt_ids=(10**6,)))
    assert "HTTP 400" in (refused.error or "")
    target.alive = False
    target.script = lambda request: []
    gone = await engine.generate(REQUEST)
    assert gone.error
    await engine.stop()


async def test_no_server_is_unavailable() -> None:
    engine = OpenAIEndpoint("x", "http://127.0.0.1:9")
    with pytest.raises(EngineUnavailableError, match="x: no answer from"):
        await engine.start()


Chunk = dict[str, Any]


def foreign(chunks: list[Chunk], supported: set[str]) -> tuple[OpenAIEndpoint, list[dict[str, Any]]]:
    """A server that refuses every field but the basic ones and those named."""
    seen: list[dict[str, Any]] = []
    basic = {"model", "prompt", "max_tokens", "temperature", "seed", "stream"}

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        body = json.loads(request.content)
        seen.append(body)
        fields = set(body) | {f"stream_options.{name}" for name in body.get("stream_options") or ()}
        ids = not isinstance(body["prompt"], str)
        if fields - basic - supported or (ids and "prompt_ids" not in supported):
            return httpx.Response(400, json={"error": {"message": "unknown field"}})
        if not body.get("stream"):
            return httpx.Response(200, json={"choices": [{"text": "x"}]})
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]
        return httpx.Response(200, text="".join(lines))

    return OpenAIEndpoint("foreign", URL, transport=httpx.MockTransport(handle)), seen


def chunk(text: str, finish: str | None = None, **more: Any) -> Chunk:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}], **more}


Make = Callable[[], tuple[OpenAIEndpoint, list[dict[str, Any]]]]


async def test_text_only_servers_are_sent_text_and_their_total_is_used() -> None:
    usage = {"prompt_tokens": 6, "completion_tokens": 5}
    engine, seen = foreign(
        [chunk("ab"), chunk("cd"), chunk("", "stop"), {"choices": [], "usage": usage}],
        {"stream_options", "stream_options.include_usage"},
    )
    await engine.start()
    answer = await engine.generate(replace(REQUEST, ignore_eos=False))
    assert seen[-1]["prompt"] == "prompt text"
    assert (answer.text, answer.token_ids, answer.speculation) == ("abcd", None, None)
    # Of five tokens in two chunks the first counts one, so that TPOT is taken over the other four.
    assert [count for _, count in answer.arrivals] == [1, 4]
    assert engine.describe()["other_prompt_length"] == 1
    assert engine.describe()["tokens_per_chunk"] == "taken as 1"
    unsupported = await engine.generate(REQUEST)
    assert unsupported.error == "the endpoint does not support ignore_eos"


async def test_running_usage_tells_the_tokens_of_each_chunk() -> None:
    def counted(text: str, total: int, finish: str | None = None) -> Chunk:
        return chunk(text, finish, usage={"prompt_tokens": 5, "completion_tokens": total})

    engine, _ = foreign(
        [counted("ab", 2), counted("c", 3), counted("defg", 7, "length")],
        {
            "prompt_ids", "ignore_eos", "stream_options", "stream_options.include_usage",
            "stream_options.continuous_usage_stats",
        },
    )  # fmt: skip
    await engine.start()
    answer = await engine.generate(REQUEST)
    assert [count for _, count in answer.arrivals] == [2, 1, 4]
    assert engine.describe()["other_prompt_length"] == 0


ALL_FIELDS = {
    "prompt_ids", "ignore_eos", "return_token_ids", "stream_options", "stream_options.include_usage",
    "stream_options.continuous_usage_stats",
}  # fmt: skip


async def test_a_server_that_takes_every_field_and_tells_the_total_alone_is_counted_once() -> None:
    """As llama.cpp's own server: the total comes with the chunk that has the finish reason."""
    usage = {"prompt_tokens": 5, "completion_tokens": 4}
    engine, _ = foreign([*map(chunk, "abcd"), chunk("", "length", usage=usage)], ALL_FIELDS)
    await engine.start()
    answer = await engine.generate(REQUEST)
    assert answer.error is None
    assert answer.num_tokens == 4
    assert [count for _, count in answer.arrivals] == [1, 1, 1, 1]
    assert engine.describe()["tokens_per_chunk"] == "taken as 1"


async def test_a_chunk_that_lacks_the_running_usage_counts_once() -> None:
    def counted(text: str, total: int, finish: str | None = None) -> Chunk:
        return chunk(text, finish, usage={"prompt_tokens": 5, "completion_tokens": total})

    engine, _ = foreign([counted("ab", 2), chunk("c"), counted("d", 4, "length")], ALL_FIELDS)
    await engine.start()
    answer = await engine.generate(REQUEST)
    assert engine.describe()["tokens_per_chunk"] == "reported"
    assert [count for _, count in answer.arrivals] == [2, 1, 1]


async def test_more_chunks_than_tokens_count_no_more_than_the_total() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    engine, _ = foreign([*map(chunk, "abc"), chunk("d", "stop"), {"choices": [], "usage": usage}], ALL_FIELDS)
    await engine.start()
    answer = await engine.generate(REQUEST)
    assert [count for _, count in answer.arrivals] == [1, 1, 0, 0]


async def test_an_answer_that_ends_at_its_limit_has_that_many_tokens_where_nothing_tells_them() -> None:
    engine, _ = foreign([chunk("ab"), chunk("cd", "length")], {"prompt_ids", "ignore_eos"})
    await engine.start()
    assert [count for _, count in (await engine.generate(REQUEST)).arrivals] == [1, 3]


async def test_how_long_a_request_may_take_is_not_the_drivers_business() -> None:
    engine, _ = foreign([chunk("a", "stop")], ALL_FIELDS)
    await engine.start()
    assert (engine._http.timeout.read, engine._http.timeout.pool) == (None, None)


async def test_a_stream_that_stops_early_is_an_error() -> None:
    engine, _ = foreign([chunk("ab")], {"prompt_ids", "ignore_eos"})
    await engine.start()
    answer = await engine.generate(REQUEST)
    assert answer.error == "the stream ended before the answer did"
    broken, _ = foreign([{"error": {"message": "out of memory"}}], {"prompt_ids", "ignore_eos"})
    await broken.start()
    assert "out of memory" in ((await broken.generate(REQUEST)).error or "")
