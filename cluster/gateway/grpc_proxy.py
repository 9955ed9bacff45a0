"""What Serve's gRPC proxy registers for the client service, so that leaving a stream always cancels it.

Serve (2.60) cancels the replica's call only when the cancellation of an RPC reaches the proxy while it waits
for the next message. When it arrives while a message is being sent, the proxy's generator is left suspended,
and the replica goes on generating for nobody. Here a task of its own reads the proxy's generator, so that it
always waits for a message, and the end of the RPC cancels that task.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from protos.s2d.v1.generation_pb2_grpc import add_GenerationServiceServicer_to_server

SERVER_STREAMING = "UNARY_STREAM"
StreamHandler = Callable[[Any, Any], AsyncGenerator[Any, None]]


def guarded(handler: StreamHandler) -> StreamHandler:
    """The same server-streaming handler, cancelled as soon as its RPC ends."""

    async def unary_stream(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        # Unbounded, but a stream holds at most as many messages as tokens were asked for.
        messages: asyncio.Queue[Any] = asyncio.Queue()

        async def read() -> None:
            try:
                async for message in handler(request, context):
                    messages.put_nowait(message)
            finally:
                messages.put_nowait(None)

        reader = asyncio.create_task(read())
        context.add_done_callback(lambda _: reader.cancel())
        try:
            while (message := await messages.get()) is not None:
                yield message
            await reader
        finally:
            reader.cancel()

    return unary_stream


def add_generation_service(servicer: Any, server: Any) -> None:
    """Register the service; named in `grpc_servicer_functions`. On a server that is not Serve's, just that."""
    factory = getattr(server, "service_handler_factory", None)
    if factory is None:
        add_GenerationServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
        return

    def guarding(*, service_method: str, streaming_type: Any) -> Any:
        handler = factory(service_method=service_method, streaming_type=streaming_type)
        return guarded(handler) if streaming_type.name == SERVER_STREAMING else handler

    server.service_handler_factory = guarding
    try:
        add_GenerationServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    finally:
        server.service_handler_factory = factory
