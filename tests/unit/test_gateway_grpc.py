"""The gRPC service in front of fake targets, through a real grpc.aio server and the package's client."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import Mock

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from actors.sampling.params import GrammarSpec, SamplingParams, SpeculationParams
from actors.target_worker.messages import GenerationChunk, GenerationRequest, RequestError
from actors.text.messages import ChatMessage
from cluster.client import RetryPolicy, S2DClient, S2DError
from cluster.gateway import grpc_health
from cluster.gateway.grpc_service import GenerationServicer
from cluster.gateway.routes import Gateway
from protos.s2d.v1 import generation_pb2 as pb
from protos.s2d.v1 import generation_pb2_grpc
from tests.unit.fake_target import MODEL, SPECULATION_FIELDS, FakeTarget, gateway, refuse


class Adapter(generation_pb2_grpc.GenerationServiceServicer):
    """What the Serve deployment does, without Serve."""

    def __init__(self, served: Gateway) -> None:
        self._servicer = GenerationServicer(served)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for chunk in self._servicer.generate(request, context):
            yield chunk

    async def Chat(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for chunk in self._servicer.chat(request, context):
            yield chunk

    async def Tokenize(self, request: Any, context: Any) -> Any:
        return await self._servicer.tokenize(request, context)

    async def Detokenize(self, request: Any, context: Any) -> Any:
        return await self._servicer.detokenize(request, context)

    async def ListModels(self, request: Any, context: Any) -> Any:
        return await self._servicer.list_models(context)

    async def GetModelInfo(self, request: Any, context: Any) -> Any:
        return await self._servicer.get_model_info(request, context)


@asynccontextmanager
async def serving(served: Gateway, **options: Any) -> AsyncIterator[S2DClient]:
    server = grpc.aio.server()
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(Adapter(served), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    options = {"retry": RetryPolicy(attempts=1), **options}
    try:
        async with S2DClient(f"127.0.0.1:{port}", timeout_s=10.0, **options) as client:
            yield client
    finally:
        await server.stop(0)


async def whole(stream: AsyncIterator[pb.GenerateChunk]) -> str:
    return "".join([chunk.text async for chunk in stream])


def every_call(client: S2DClient, text: str) -> list[Coroutine[Any, Any, object]]:
    """Of each method whose request has fields, with `text` in it."""
    return [
        whole(client.generate(MODEL, text)),
        whole(client.chat(MODEL, [("user", text)])),
        client.tokenize(MODEL, text),
        client.detokenize(MODEL, [1] * len(text)),
        client.model_info(text),
    ]


async def test_generate() -> None:
    target = FakeTarget()
    async with serving(gateway(target)) as client:
        chunks = [
            c async for c in client.generate(
                MODEL, "hi", n=2, logprobs=1, seed=-5, max_tokens=3, prompt_logprobs=0, request_id="r1",
                logit_bias={3: -1.0}, stop=["x"], speculation={"max_draft_tokens": 2, "force": True},
            )
        ]  # fmt: skip
    for index, text in ((0, "abc"), (1, "bcd")):
        mine = [c for c in chunks if c.index == index]
        assert "".join(c.text for c in mine) == text
        assert [i for c in mine for i in c.token_ids] == [ord(t) for t in text]
        assert mine[0].seed == -5
        assert len(mine[0].prompt_logprobs) == 2
        assert not mine[0].prompt_logprobs[0].HasField("chosen")
        assert mine[0].logprobs[0].chosen.token == text[0]
        assert (list(mine[1].tokens_per_round), list(mine[1].accepted_per_round)) == ([1], [1])
        assert mine[-1].finish_reason == "length"
    assert [c.HasField("usage") for c in chunks] == [False] * 5 + [True]
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (5, 6)
    assert not chunks[-1].HasField("speculation")
    assert {c.request_id for c in chunks} == {"r1"}
    request = target.requests[0]
    assert (request.sampling.logit_bias, request.stop) == ({3: -1.0}, ("x",))
    assert (request.speculation.max_draft_tokens, request.speculation.force) == (2, True)


SAMPLING: dict[str, Any] = {
    "max_tokens": 9,
    "min_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.25,
    "top_k": 7,
    "min_p": 0.125,
    "seed": -5,
    "n": 2,
    "stop": ["x", "y"],
    "stop_token_ids": [3, 4],
    "ignore_eos": True,
    "logit_bias": {5: -1.0},
    "presence_penalty": 1.0,
    "frequency_penalty": -1.0,
    "repetition_penalty": 1.5,
    "logprobs": 2,
    "grammar": {"kind": "lark", "text": 'start: "a"'},
    "prompt_logprobs": 2,
    "include_stop_str_in_output": True,
    "bad_words": ["b"],
    "allowed_token_ids": [6, 7],
}
OF_THE_REQUEST = {"n", "stop", "include_stop_str_in_output", "bad_words"}
"""Fields that are not the sampler's."""


async def test_every_field_arrives() -> None:
    """A field that is new in the messages belongs into the dictionaries, with a value that is no default."""
    assert SAMPLING.keys() == {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}
    assert SPECULATION_FIELDS.keys() == {field.name for field in pb.SpeculationParams.DESCRIPTOR.fields}
    ids = {"stop_token_ids": (3, 4), "allowed_token_ids": (6, 7)}
    given = SAMPLING | ids | {"grammar": GrammarSpec("lark", 'start: "a"')}
    sampling = SamplingParams(**{name: given[name] for name in given.keys() - OF_THE_REQUEST})
    speculation = SpeculationParams(**SPECULATION_FIELDS)
    assert all(
        getattr(sampling, name) != getattr(SamplingParams(), name)
        for name in SAMPLING.keys() - OF_THE_REQUEST
    )
    assert all(value != getattr(SpeculationParams(), name) for name, value in SPECULATION_FIELDS.items())
    target = FakeTarget()
    async with serving(gateway(target)) as client:
        for stream in (
            client.generate(MODEL, "p", echo=True, speculation=SPECULATION_FIELDS, **SAMPLING),
            client.chat(MODEL, [("user", "p")], speculation=SPECULATION_FIELDS, **SAMPLING),
        ):
            assert [chunk async for chunk in stream]
    prompts: list[dict[str, Any]] = [
        {"prompt_text": "p", "echo": True},
        {"messages": (ChatMessage("user", "p"),)},
    ]
    assert target.requests == [
        GenerationRequest(
            request.request_id,
            sampling,
            max_tokens=9,
            n=2,
            stop=("x", "y"),
            include_stop=True,
            bad_words=("b",),
            speculation=speculation,
            **prompt,
        )
        for request, prompt in zip(target.requests, prompts, strict=True)
    ]


async def test_chat_defaults_and_speculation() -> None:
    target = FakeTarget()
    async with serving(gateway(target)) as client:
        stream = client.chat(MODEL, [("user", "hi")], grammar={"kind": "regex", "text": "a"})
        chunks = [c async for c in stream]
    assert chunks[-1].speculation.acceptance_histogram == [0, 2]
    assert chunks[-1].speculation.mean_acceptance_length == 2.0
    assert target.requests[0].max_tokens is None
    grammar = target.requests[0].sampling.grammar
    assert grammar is not None
    assert (grammar.kind, grammar.text) == ("regex", "a")


async def test_a_choice_of_texts() -> None:
    target = FakeTarget()
    async with serving(gateway(target)) as client:
        await whole(client.generate(MODEL, "x", grammar={"kind": "choice", "choices": ["a.", "b"]}))
    assert target.requests[0].sampling.grammar == GrammarSpec("regex", "(a\\.|b)")


async def test_echo() -> None:
    async with serving(gateway(FakeTarget())) as client:
        assert await whole(client.generate(MODEL, "x", echo=True, max_tokens=0)) == "PROMPT"
        assert await whole(client.generate(MODEL, "x", echo=True, max_tokens=1)) == "PROMPTa"


async def test_ids_prompt_and_default_limit() -> None:
    target = FakeTarget()
    async with serving(gateway(target)) as client:
        assert [c async for c in client.generate(MODEL, [1, 2])]
    assert (target.requests[0].prompt_ids, target.requests[0].max_tokens) == ((1, 2), 16)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 2.0}, "top_p"),
        ({"logprobs": 99}, "logprobs"),
        ({"prompt_logprobs": 99}, "prompt_logprobs"),
        ({"n": 0}, "n"),
        ({"bad_words": [" "]}, "bad_words"),
        ({"allowed_token_ids": [5000]}, "allowed_token_ids"),
        ({"grammar": {"kind": "choice"}}, "structured_outputs.choice"),
        ({"logit_bias": {5000: 1.0}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"grammar": {"kind": "yaml"}}, "grammar.kind"),
        ({"speculation": {"force": True}}, "speculation.max_draft_tokens"),
        ({"speculation": {"drafter": "x"}}, "speculation.drafter"),
    ],
)
async def test_invalid_argument_names_the_field(options: dict[str, Any], field: str) -> None:
    target = FakeTarget()
    async with serving(gateway(target)) as client:
        chat = client.chat(MODEL, [("user", "x")], **options)
        for stream in (client.generate(MODEL, "x", **options), chat):
            with pytest.raises(S2DError) as caught:
                async for _ in stream:
                    pass
            assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
            assert caught.value.message.startswith(field)
    assert target.requests == []


async def test_missing_fields() -> None:
    async with serving(gateway(FakeTarget())) as client:
        stub: Any = client._stub
        for call in (
            stub.Generate(pb.GenerateRequest(model=MODEL)),
            stub.Chat(pb.ChatRequest(model=MODEL)),
            stub.Generate(pb.GenerateRequest(text="x")),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in call:
                    pass
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("kind", "code", "retry"),
    [
        ("overloaded", grpc.StatusCode.RESOURCE_EXHAUSTED, 4.0),
        ("unavailable", grpc.StatusCode.UNAVAILABLE, 4.0),
        ("internal", grpc.StatusCode.INTERNAL, None),
        ("invalid", grpc.StatusCode.INVALID_ARGUMENT, None),
    ],
)
async def test_worker_errors(kind: str, code: grpc.StatusCode, retry: float | None) -> None:
    async with serving(gateway(FakeTarget(script=refuse(kind)))) as client:
        with pytest.raises(S2DError) as caught:
            async for _ in client.generate(MODEL, "x"):
                pass
    assert (caught.value.code, caught.value.retry_after_s) == (code, retry)


async def test_unknown_and_dead_models() -> None:
    target = FakeTarget()
    async with serving(gateway(target)) as client:
        for call in (client.model_info("x"), client.tokenize("x", "t")):
            with pytest.raises(S2DError) as caught:
                await call
            assert caught.value.code is grpc.StatusCode.NOT_FOUND
        target.alive = False
        with pytest.raises(S2DError) as caught:
            await client.tokenize(MODEL, "t")
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert (await client.list_models())[0].ready is False


async def test_models_and_tokenize() -> None:
    served = gateway(FakeTarget())
    async with serving(served) as client:
        assert await client.tokenize(MODEL, "ab") == (1, 97, 98)
        assert await client.tokenize(MODEL, "ab", add_special_tokens=False) == (97, 98)
        assert bytes(await client.tokenize_chat(MODEL, [("user", "hi")])) == b"<user>hi<assistant>"
        assert bytes(await client.tokenize_chat(MODEL, [("user", "hi")], False)) == b"<user>hi"
        assert await client.detokenize(MODEL, [97, 98]) == "ab"
        one = await client.model_info(MODEL)
        assert (one.backend, one.state) == ("fake", "ready")
        assert (one.id, one.max_model_len, one.dtype, one.ready) == (MODEL, 128, "float32", True)
        assert await client.list_models() == [one]


async def test_what_cannot_be_tokenized_names_the_field() -> None:
    async with serving(gateway(FakeTarget())) as client:
        stub: Any = client._stub
        both = pb.TokenizeRequest(text="x", messages=[pb.ChatMessage(role="user", content="x")])
        robot = pb.TokenizeRequest(messages=[pb.ChatMessage(role="robot", content="x")])
        unknown = pb.DetokenizeRequest(token_ids=[5000])
        for call, said in (
            (stub.Tokenize(both), "exactly one of prompt and messages"),
            (stub.Tokenize(robot), "messages.0.role"),
            (stub.Detokenize(unknown), "token_ids: token ids must be below"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert said in (caught.value.details() or "")


async def test_leaving_a_stream_cancels_the_request() -> None:
    target = FakeTarget(length=500, hold=asyncio.Event())
    served = gateway(target)
    async with serving(served) as client:
        stream = client.generate(MODEL, "x", max_tokens=400)
        async for _ in stream:
            break
        await stream.aclose()
        for _ in range(100):
            if not target.running:
                break
            await asyncio.sleep(0.02)
    assert (target.running, target.cancelled, served.in_flight.count) == (0, 1, 0)


async def test_each_failure_is_counted_once() -> None:
    target = FakeTarget()
    served = gateway(target, max_body_bytes=4096, api_key="k")
    failures: list[tuple[str, str]] = []
    failed = asyncio.Event()

    def note(model: str, reason: str) -> None:
        failures.append((model, reason))
        failed.set()

    served.on_failure = note
    async with serving(served) as client:
        with pytest.raises(S2DError):
            await whole(client.generate(MODEL, "x"))
    assert failures == []  # a call without the key
    async with serving(served, api_key="k") as client:
        assert await whole(client.generate(MODEL, "x")) == "abcd"
        assert failures == []
        for model, prompt, expected in (
            ("other", "x", ("", "not_found")),
            ("", "x", ("", "invalid")),
            (MODEL, "x" * 4100, (MODEL, "invalid")),
        ):
            with pytest.raises(S2DError):
                await whole(client.generate(model, prompt))
            assert failures == [expected]
            failures.clear()
        target.script = refuse("overloaded")
        with pytest.raises(S2DError):
            await whole(client.chat(MODEL, [("user", "x")]))
        assert failures == [(MODEL, "overloaded")]
        failures.clear()
        target.script, target.length, target.hold = None, 500, asyncio.Event()
        failed.clear()
        stream = client.generate(MODEL, "x", max_tokens=100)
        await anext(stream)
        await stream.aclose()
        await asyncio.wait_for(failed.wait(), 5.0)
        assert failures == [(MODEL, "cancelled")]


async def test_client_retries_before_the_first_chunk_only() -> None:
    target = FakeTarget()
    attempts = 0

    def sometimes(request: Any) -> list[GenerationChunk]:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            return [GenerationChunk(error=RequestError("unavailable", "later", retry_after_s=0.0))]
        target.script = None
        return target.chunks(request)

    target.script = sometimes
    retry = RetryPolicy(attempts=3, initial_backoff_s=0.01)
    async with serving(gateway(target, max_resumes=0), retry=retry) as client:
        assert "".join([c.text async for c in client.generate(MODEL, "x")]) == "abcd"
        assert attempts == 3
        target.requests.clear()
        target.script = lambda request: [
            GenerationChunk(text="a", token_ids=(97,)),
            GenerationChunk(error=RequestError("unavailable", "x")),
        ]
        with pytest.raises(S2DError):
            async for _ in client.generate(MODEL, "x"):
                pass
        assert len(target.requests) == 1


async def test_api_key() -> None:
    target = FakeTarget()
    served = gateway(target, api_key="k")
    async with serving(served) as client:
        for call in every_call(client, "x"):
            with pytest.raises(S2DError) as caught:
                await call
            assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(S2DError) as caught:
            await client.list_models()
        assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED
    assert target.requests == []
    async with serving(served, api_key="k") as client:
        assert await client.list_models()
        assert await whole(client.generate(MODEL, "x")) == "abcd"


async def test_a_request_larger_than_an_http_body_may_be() -> None:
    target = FakeTarget()
    async with serving(gateway(target, max_body_bytes=4096)) as client:
        for call in every_call(client, "x" * 4100):
            with pytest.raises(S2DError, match="larger than 4096 bytes") as caught:
                await call
            assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
        assert target.requests == []
        size = pb.GenerateRequest(model=MODEL, text="x" * 4000, sampling=pb.SamplingParams()).ByteSize()
        assert await whole(client.generate(MODEL, "x" * (4000 + 4096 - size))) == "abcd"


async def test_a_chunk_larger_than_grpc_takes_by_itself() -> None:
    target = FakeTarget()
    target.script = lambda request: [GenerationChunk(text="x" * 5 * 2**20, finish_reason="length")]
    async with serving(gateway(target), retry=RetryPolicy(attempts=3)) as client:
        assert len(await whole(client.generate(MODEL, "x"))) == 5 * 2**20
    assert len(target.requests) == 1


async def test_health_is_what_ready_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_health, "WATCH_INTERVAL_S", 0.0)
    serves, does_not = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
    target = FakeTarget()
    served = gateway(target)
    health = grpc_health.HealthServicer(served)
    watch = health.watch(HealthCheckRequest())
    for alive, draining, status in (
        (True, False, serves),
        (False, False, does_not),
        (True, False, serves),
        (True, True, does_not),
    ):
        target.alive, served.in_flight.draining = alive, draining
        assert (await health.check(HealthCheckRequest(), Mock())).status == status
        async with asyncio.timeout(5):
            assert (await anext(watch)).status == status
    again = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0.02)
    assert not again.done(), "told again, though nothing changed"
    again.cancel()


async def test_request_id_comes_back_in_the_trailers() -> None:
    async with serving(gateway(FakeTarget())) as client:
        stub: Any = client._stub
        call = stub.Generate(pb.GenerateRequest(model=MODEL, text="x", request_id="mine"))
        assert [c async for c in call]
        assert ("x-request-id", "mine") in [tuple(t) for t in await call.trailing_metadata()]


async def test_the_log_joins_the_clients_id_and_ours(caplog: pytest.LogCaptureFixture) -> None:
    """In one line, whatever the id is."""
    caplog.set_level(logging.INFO, "cluster.gateway.routes")
    target = FakeTarget()
    async with serving(gateway(target)) as client:
        for given in ("mine", "a\nforged line" + 1000 * "x"):
            assert [c async for c in client.generate(MODEL, "x", request_id=given)]
    first, second = [r.getMessage() for r in caplog.records if r.name == "cluster.gateway.routes"]
    assert first == f"request {target.requests[0].request_id} is the client's 'mine'"
    assert target.requests[1].request_id in second
    assert "\n" not in second
    assert len(second) < 400
