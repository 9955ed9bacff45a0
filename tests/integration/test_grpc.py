"""The gRPC API of a running server, with a plain grpcio client that knows nothing but reflection."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from cluster.client import S2DClient, S2DError
from cluster.config import GatewayConfig
from protos.s2d.v1 import generation_pb2 as pb
from protos.s2d.v1 import generation_pb2_grpc as pb_grpc
from tests.integration.server import MODEL, Server

pytestmark = pytest.mark.serve
METADATA = (("application", "s2d"),)


def test_reflection_is_enough_to_chat(server: Server) -> None:
    with grpc.insecure_channel(server.grpc_address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "s2d.v1.GenerationService" in database.get_services()
        pool = DescriptorPool(database)
        method = pool.FindServiceByName("s2d.v1.GenerationService").FindMethodByName("Chat")
        request_type = message_factory.GetMessageClass(method.input_type)
        reply_type = message_factory.GetMessageClass(method.output_type)
        call: Any = channel.unary_stream(
            "/s2d.v1.GenerationService/Chat",
            request_serializer=request_type.SerializeToString,
            response_deserializer=reply_type.FromString,
        )
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "sampling": {"max_tokens": 12, "temperature": 0},
        }
        chunks = list(call(json_format.ParseDict(body, request_type()), metadata=METADATA, timeout=60))
    text = "".join(chunk.text for chunk in chunks)
    assert "Paris" in text
    assert chunks[-1].usage.completion_tokens == 8
    assert descriptor_pool.Default() is not pool


def test_the_standard_health_service_answers_on_the_client_port(server: Server) -> None:
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "s2d.v1.GenerationService"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=10)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=10)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


def _refused(server: Server, request: pb.GenerateRequest) -> grpc.RpcError:
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(request, metadata=METADATA, timeout=30))
    return caught.value


def test_errors_have_codes_and_name_the_field(server: Server) -> None:
    unknown = _refused(server, pb.GenerateRequest(model="nobody", text="x"))
    assert unknown.code() == grpc.StatusCode.NOT_FOUND
    bad = _refused(server, pb.GenerateRequest(model=MODEL, text="x", sampling=pb.SamplingParams(top_p=7.0)))
    assert bad.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "top_p" in bad.details()
    empty = _refused(server, pb.GenerateRequest(model=MODEL))
    assert empty.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_request_of_the_largest_size_reaches_the_target(server: Server) -> None:
    """Its ids take twice as many bytes from the gateway to the target as to the gateway."""
    limit = GatewayConfig().max_body_bytes
    async with S2DClient(server.grpc_address) as client:
        for count, said in (
            (limit - 100, "leaves no room for an answer"),
            (limit, f"larger than {limit} bytes"),
        ):
            with pytest.raises(S2DError, match=said) as caught:
                await anext(client.generate(MODEL, [5] * count))
            assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_typed_client_streams_like_http(server: Server) -> None:
    async with S2DClient(server.grpc_address) as client:
        models = await client.list_models()
        assert [m.id for m in models] == [MODEL]
        stream = client.generate(MODEL, "one two three one two", max_tokens=10, temperature=0.9, seed=4)
        text = "".join([chunk.text async for chunk in stream])
    answer = await asyncio.to_thread(
        server.complete, "one two three one two", max_tokens=10, temperature=0.9, seed=4
    )
    assert text == answer["choices"][0]["text"]
