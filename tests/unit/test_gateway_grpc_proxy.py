"""Leaving a server-streaming call cancels the handler behind Serve's gRPC proxy, whenever it happens."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from cluster.gateway.grpc_proxy import add_generation_service, guarded
from protos.s2d.v1 import generation_pb2 as pb

METHOD = "/s2d.v1.GenerationService/Generate"
CALLS = 40


class ProxyLike:
    """Serve's handler in miniature: cancellation is passed on only where it waits for the next message, and
    the context is read after the call has ended."""

    def __init__(self) -> None:
        self.begun = self.cancelled = self.abandoned = self.finished = 0

    async def stream(self, request: Any, context: Any) -> AsyncIterator[bytes]:
        self.begun += 1
        for index in range(int(request.text)):
            try:
                await asyncio.sleep(0.001)
            except asyncio.CancelledError:
                self.cancelled += 1
                context.set_code(grpc.StatusCode.CANCELLED)
                assert context.peer()
                return
            try:
                yield pb.GenerateChunk(index=index).SerializeToString()
            except GeneratorExit:
                self.abandoned += 1
                raise
        self.finished += 1
        context.set_code(grpc.StatusCode.DATA_LOSS)
        context.set_details("as the handler says")
        context.set_trailing_metadata((("k", "v"),))


async def serve(proxy: ProxyLike) -> tuple[grpc.aio.Server, grpc.aio.Channel]:
    handler = grpc.unary_stream_rpc_method_handler(
        guarded(proxy.stream), request_deserializer=pb.GenerateRequest.FromString
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("s2d.v1.GenerationService", {"Generate": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, grpc.aio.insecure_channel(f"127.0.0.1:{port}")


def call(channel: grpc.aio.Channel, messages: int) -> Any:
    stub = channel.unary_stream(
        METHOD,
        request_serializer=pb.GenerateRequest.SerializeToString,
        response_deserializer=pb.GenerateChunk.FromString,
    )
    return stub(pb.GenerateRequest(text=str(messages)))


async def test_every_abandoned_call_is_cancelled() -> None:
    proxy = ProxyLike()
    server, channel = await serve(proxy)
    rng = random.Random(3)

    async def leave() -> None:
        running = call(channel, 100_000)
        left = rng.randint(1, 12)
        async for _ in running:
            left -= 1
            if not left:
                break
        await asyncio.sleep(rng.random() * 0.003)
        running.cancel()

    await asyncio.gather(*(leave() for _ in range(CALLS)))
    async with asyncio.timeout(5):
        while proxy.cancelled < CALLS:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (proxy.begun, proxy.cancelled, proxy.abandoned) == (CALLS, CALLS, 0)
    await channel.close(None)
    await server.stop(0)


async def test_messages_status_and_trailers_pass_through() -> None:
    server, channel = await serve(ProxyLike())
    running = call(channel, 30)
    indices: list[int] = []

    async def read() -> None:
        async for message in running:
            indices.append(message.index)  # noqa: PERF401 - what came before the error counts

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read()
    error = caught.value
    assert (error.code(), error.details()) == (grpc.StatusCode.DATA_LOSS, "as the handler says")
    assert ("k", "v") in [tuple(item) for item in error.trailing_metadata()]
    assert indices == list(range(30))
    await channel.close(None)
    await server.stop(0)


def test_only_streaming_handlers_are_wrapped_and_the_factory_is_restored() -> None:
    class Kind:
        def __init__(self, name: str) -> None:
            self.name = name

    made: dict[str, Any] = {}

    class Server:
        def __init__(self) -> None:
            self.service_handler_factory = self.make

        def make(self, service_method: str, streaming_type: Kind) -> Any:
            return streaming_type

        def add_generic_rpc_handlers(self, _: Any) -> None:
            for name in ("UNARY_UNARY", "UNARY_STREAM"):
                made[name] = self.service_handler_factory(service_method="m", streaming_type=Kind(name))

        def add_registered_method_handlers(self, *_: Any) -> None:
            pass

    class Servicer:
        def __getattr__(self, name: str) -> Any:
            return None

    server = Server()
    add_generation_service(Servicer(), server)
    assert isinstance(made["UNARY_UNARY"], Kind)
    assert callable(made["UNARY_STREAM"])
    assert server.service_handler_factory == server.make
