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


class RpcView:
    """The parts of a grpc.aio context that Serve's proxy uses, safe to use after the RPC has ended.

    What is read is copied at the start: asking the C core about a call that is gone may crash the process.
    What is written after the end is dropped.
    """

    def __init__(self, context: Any) -> None:
        self._context = context
        self._open = True
        self._read = {
            "auth_context": context.auth_context(),
            "invocation_metadata": context.invocation_metadata(),
            "peer": context.peer(),
            "peer_identities": context.peer_identities(),
            "peer_identity_key": context.peer_identity_key(),
        }

    def close(self) -> None:
        self._open = False

    def auth_context(self) -> Any:
        return self._read["auth_context"]

    def invocation_metadata(self) -> Any:
        return self._read["invocation_metadata"]

    def peer(self) -> Any:
        return self._read["peer"]

    def peer_identities(self) -> Any:
        return self._read["peer_identities"]

    def peer_identity_key(self) -> Any:
        return self._read["peer_identity_key"]

    def code(self) -> Any:
        return self._context.code()

    def details(self) -> Any:
        return self._context.details()

    def trailing_metadata(self) -> Any:
        return self._context.trailing_metadata()

    def set_code(self, code: Any) -> None:
        if self._open:
            self._context.set_code(code)

    def set_details(self, details: str) -> None:
        if self._open:
            self._context.set_details(details)

    def set_compression(self, compression: Any) -> None:
        if self._open:
            self._context.set_compression(compression)

    def set_trailing_metadata(self, metadata: Any) -> None:
        if self._open:
            self._context.set_trailing_metadata(metadata)


def guarded(handler: StreamHandler) -> StreamHandler:
    """The same server-streaming handler, cancelled as soon as its RPC ends."""

    async def unary_stream(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        # Unbounded, but a stream holds at most as many messages as tokens were asked for.
        messages: asyncio.Queue[Any] = asyncio.Queue()
        view = RpcView(context)

        async def read() -> None:
            try:
                async for message in handler(request, view):
                    messages.put_nowait(message)
            finally:
                messages.put_nowait(None)

        reader = asyncio.create_task(read())

        def end(_: object = None) -> None:
            view.close()
            reader.cancel()

        context.add_done_callback(end)
        try:
            while (message := await messages.get()) is not None:
                yield message
            await reader
        finally:
            end()

    return unary_stream


def add_generation_service(servicer: Any, server: Any) -> None:
    """Register the service; `grpc_servicer_functions` names this. Other servers than Serve's get it as is."""
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
