"""The OpenAI API of a running server: equality on and off, bytes, limits, bad input, cancellation."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests import prompts
from tests.integration.ray_node import wait_until
from tests.integration.server import MODEL, Server

pytestmark = pytest.mark.serve
OFF = {"enabled": False}


def forced(length: int, drafter: str, exit_depth: int | None = None) -> dict[str, Any]:
    body: dict[str, Any] = {"max_draft_tokens": length, "force": True, "drafter": drafter}
    return body | ({"exit_depth": exit_depth} if exit_depth else {})


def ids(answer: dict[str, Any]) -> list[list[int]]:
    return [choice["token_ids"] for choice in answer["choices"]]


def stream(server: Server, path: str, body: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """All events of a stream, and the concatenated text."""
    events: list[dict[str, Any]] = []
    with server.client() as client, client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        data = (line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: {"))
        events.extend(json.loads(line) for line in data)
    text = ""
    for event in events:
        for choice in event["choices"]:
            text += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    return events, text


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 5, "top_p": 0.9}])
@pytest.mark.parametrize(
    "speculation", [forced(3, "prompt_lookup"), forced(3, "token_recycling"), forced(3, "nested", 2), {}]
)
def test_speculation_changes_nothing(
    server: Server, sampling: dict[str, Any], speculation: dict[str, Any]
) -> None:
    texts = [prompts.REPETITIVE[2], prompts.QUESTIONS[5]]
    common = {"max_tokens": 32, "return_token_ids": True, **sampling}
    plain = server.complete(texts, speculation=OFF, **common)
    drafted = server.complete(texts, speculation=speculation, **common)
    assert ids(drafted) == ids(plain)
    assert drafted["seed"] == plain["seed"] or "seed" not in sampling


def test_a_full_depth_draft_is_always_accepted(server: Server) -> None:
    answer = server.complete(
        prompts.QUESTIONS[1],
        max_tokens=40,
        temperature=1.0,
        seed=3,
        ignore_eos=True,
        speculation=forced(3, "nested", 30),
    )
    metrics = answer["metrics"]["speculative_decoding"]
    assert metrics["num_draft_tokens"] > 20
    assert metrics["draft_acceptance_rate"] == 1.0
    assert answer["usage"]["completion_tokens"] == 40


def test_stream_and_whole_agree_in_bytes_ids_and_usage(server: Server) -> None:
    for prompt in (*prompts.SCRIPTS[3:7], prompts.QUESTIONS[0]):
        body = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": 40,
            "temperature": 1.2,
            "seed": 12,
            "return_token_ids": True,
        }
        whole = server.complete(prompt, **{k: v for k, v in body.items() if k not in ("model", "prompt")})
        events, text = stream(server, "/v1/completions", {**body, "stream_options": {"include_usage": True}})
        assert text == whole["choices"][0]["text"]
        streamed = [t for e in events for c in e["choices"] for t in c.get("token_ids") or ()]
        assert streamed == whole["choices"][0]["token_ids"]
        assert (
            events[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == len(streamed)
        )


def test_a_stop_string_never_leaks(server: Server) -> None:
    prompt = prompts.REPETITIVE[0]
    plain = server.complete(prompt, max_tokens=40, temperature=0)["choices"][0]["text"]
    stop = plain[11:18]
    assert stop
    cut = plain[: plain.index(stop)]
    for speculation in (OFF, forced(5, "prompt_lookup"), forced(5, "nested", 30)):
        body = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": 40,
            "temperature": 0,
            "stop": [stop],
            "speculation": speculation,
        }
        events, text = stream(server, "/v1/completions", body)
        assert text == cut
        reasons = [c["finish_reason"] for e in events for c in e["choices"] if c["finish_reason"]]
        assert reasons == ["stop"]


def test_grammar_holds_under_speculation(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "population": {"type": "integer", "minimum": 0, "maximum": 9999999},
        },
        "required": ["city", "population"],
        "additionalProperties": False,
    }
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Describe Paris as JSON."}],
        "max_tokens": 80,
        "temperature": 0,
        "response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
    }
    texts = []
    with server.client() as client:
        for speculation in (OFF, forced(4, "nested", 30), forced(4, "token_recycling")):
            answer = client.post("/v1/chat/completions", json={**body, "speculation": speculation})
            assert answer.status_code == 200, answer.text
            choice = answer.json()["choices"][0]
            assert choice["finish_reason"] == "stop"
            texts.append(choice["message"]["content"])
    assert set(json.loads(texts[0])) == {"city", "population"}
    assert len(set(texts)) == 1


def test_prompts_at_the_limit_of_the_context(server: Server) -> None:
    limit = 2048
    for length in (limit - 1, limit - 4):
        answer = server.complete(
            [7] * length, max_tokens=16, temperature=0, speculation=forced(4, "prompt_lookup")
        )
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == limit - length
    with server.client() as client:
        answer = client.post("/v1/completions", json={"model": MODEL, "prompt": [7] * limit, "max_tokens": 4})
        assert answer.status_code == 400
        assert "2048" in answer.json()["error"]["message"]
    assert server.complete("still alive?", max_tokens=2)["choices"]


def test_echo_gives_prompt_logprobs(server: Server) -> None:
    answer = server.complete("The capital of France is", max_tokens=0, echo=True, logprobs=2)
    logprobs = answer["choices"][0]["logprobs"]
    assert answer["choices"][0]["text"] == "The capital of France is"
    assert logprobs["token_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    assert answer["usage"]["completion_tokens"] == 0


CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
BAD: list[tuple[str, dict[str, Any] | str | bytes, int, str]] = [
    ("/v1/chat/completions", {**CHAT, "max_tokens": "many"}, 400, "max_tokens"),
    ("/v1/chat/completions", {**CHAT, "max_tokens": -1}, 400, "max_tokens"),
    (
        "/v1/chat/completions",
        f'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "x"}}], "temperature": NaN}}',
        400,
        "",
    ),
    ("/v1/chat/completions", {**CHAT, "model": "nobody"}, 404, "model"),
    ("/v1/chat/completions", {**CHAT, "messages": []}, 400, "messages"),
    ("/v1/chat/completions", {**CHAT, "speculation": {"enabeld": True}}, 400, "speculation.enabeld"),
    ("/v1/chat/completions", {**CHAT, "speculation": {"drafter": "nobody"}}, 400, "speculation.drafter"),
    (
        "/v1/chat/completions",
        {
            **CHAT,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "nonsense"}},
            },
        },
        400,
        "response_format",
    ),
    ("/v1/chat/completions", {**CHAT, "tools": []}, 400, "tools"),
    ("/v1/completions", {"model": MODEL, "prompt": "x", "best_of": 2}, 400, "best_of"),
    ("/v1/completions", {"model": MODEL, "prompt": "x", "suffix": "y"}, 400, "suffix"),
    ("/v1/completions", {"model": MODEL, "prompt": [10**6]}, 400, "prompt"),
    ("/v1/completions", {"model": MODEL, "prompt": "x", "logit_bias": {"999999": 1}}, 400, "logit_bias"),
    ("/v1/completions", "{broken", 400, ""),
    ("/v1/completions", b"x" * (10 * 1024 * 1024), 413, ""),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), BAD)
def test_bad_input_is_refused_by_name(server: Server, path: str, body: Any, status: int, param: str) -> None:
    with server.client() as client:
        content = json.dumps(body) if isinstance(body, dict) else body
        answer = client.post(
            path, content=content, headers={"content-type": "application/json", "x-request-id": "mine"}
        )
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    if param:
        assert param in (error["param"] or "") or param in error["message"]
    assert answer.headers["x-request-id"] == "mine"


def test_a_client_that_leaves_frees_everything(server: Server) -> None:
    wait_until(server.idle, 20, "idle before")
    body = {
        "model": MODEL,
        "prompt": prompts.QUESTIONS[0],
        "max_tokens": 1900,
        "ignore_eos": True,
        "stream": True,
        "temperature": 1.0,
    }
    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as answer:
        seen = 0
        for line in answer.iter_lines():
            seen += line.startswith("data: ")
            if seen == 5:
                break
    wait_until(server.idle, 2.0, "everything is free again", interval_s=0.1)


def test_a_hundred_cancels_leave_nothing(server: Server) -> None:
    wait_until(server.idle, 20, "idle before")
    body = {
        "model": MODEL,
        "prompt": prompts.QUESTIONS[3],
        "max_tokens": 1500,
        "ignore_eos": True,
        "stream": True,
    }
    barrier = threading.Barrier(100)

    def start_and_leave(index: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            barrier.wait(60)
            with client.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code == 200 and index % 2:
                    next(answer.iter_lines(), None)

    with ThreadPoolExecutor(100) as pool:
        list(pool.map(start_and_leave, range(100)))
    wait_until(server.idle, 5.0, "nothing is left", interval_s=0.1)


def test_openai_client_streams(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert MODEL in [m.id for m in client.models.list()]
    parts = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage = "", None
    for part in parts:
        text += (part.choices[0].delta.content or "") if part.choices else ""
        usage = part.usage or usage
    assert "Paris" in text
    assert usage is not None
    assert usage.completion_tokens == 8


def test_models_tokenizer_and_operators(server: Server) -> None:
    with server.client() as client:
        model = client.get(f"/v1/models/{MODEL}").json()
        assert (model["max_model_len"], model["dtype"]) == (2048, "float32")
        tokens = client.post("/tokenize", json={"model": MODEL, "prompt": "Hello world"}).json()["tokens"]
        assert (
            client.post("/detokenize", json={"model": MODEL, "tokens": tokens}).json()["prompt"]
            == "Hello world"
        )
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 200
        assert client.get("/v1/models/nobody").status_code == 404
    engine = server.engine()
    assert engine["kv_blocks_total"] == engine["kv_blocks_used"] + engine["kv_blocks_free"]


def test_metrics_count_speculation(server: Server) -> None:
    server.complete(
        prompts.REPETITIVE[1], max_tokens=30, temperature=0, speculation=forced(3, "prompt_lookup")
    )

    def counted() -> bool:
        text = httpx.get(f"{server.url}/metrics", timeout=10).text
        names = (
            "spec_decode_num_draft_tokens",
            "spec_decode_num_accepted_tokens_per_pos",
            "time_to_first_token_seconds",
        )
        return all(name in text for name in names)

    wait_until(counted, 40, "the metrics are exported", interval_s=1.0)


def test_a_second_prompt_uses_the_prefix_cache(server: Server) -> None:
    server.reset()
    prompt = " ".join(prompts.NOISE) + " End."
    cold = server.complete(prompt, max_tokens=8, temperature=0, return_token_ids=True)
    warm = server.complete(prompt, max_tokens=8, temperature=0, return_token_ids=True)
    assert cold["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert warm["usage"]["prompt_tokens_details"]["cached_tokens"] >= 32
    assert ids(cold) == ids(warm)


def test_running_streams_go_on_while_a_long_prompt_is_prefilled(server: Server) -> None:
    gaps: list[float] = []
    ready, done = threading.Event(), threading.Event()

    def read() -> None:
        body = {
            "model": MODEL,
            "prompt": "Count:",
            "max_tokens": 120,
            "ignore_eos": True,
            "stream": True,
            "speculation": OFF,
        }
        with server.client() as client, client.stream("POST", "/v1/completions", json=body) as answer:
            last = None
            for line in answer.iter_lines():
                if not line.startswith("data: "):
                    continue
                now = time.monotonic()
                if last is not None:
                    gaps.append(now - last)
                last = now
                if len(gaps) == 10:
                    ready.set()
        done.set()

    thread = threading.Thread(target=read)
    thread.start()
    assert ready.wait(60)
    started = time.monotonic()
    server.complete([11 + i % 900 for i in range(1800)], max_tokens=1)
    prefill = time.monotonic() - started
    assert done.wait(120)
    thread.join()
    assert max(gaps) < 0.6 * prefill, (max(gaps), prefill)
