"""The gateway's clients over Ray: models through Serve handles, draft workers through leases and gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

import grpc
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from actors.engine.async_engine import EngineUnavailable
from actors.engine.messages import ResetScope
from actors.sampling.params import ParameterError
from actors.target_worker.messages import GenerationChunk, GenerationRequest, TargetInfo, TargetState
from actors.text.messages import ChatMessage
from cluster.config import DraftPoolConfig
from cluster.gateway.errors import ApiError, from_parameter_error, internal, not_ready, overloaded
from cluster.registry import Lease, RegistryClient
from protos.s2d.v1 import drafting_pb2, drafting_pb2_grpc

logger = logging.getLogger(__name__)
DRAFT_STATE_TIMEOUT_S = 1.0
_AWAY = (DeploymentUnavailableError, RayActorError, EngineUnavailable, TimeoutError)
_AWAY_CODES = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED}
"""What gRPC says of a worker that ends, or has ended."""


def to_api_error(error: BaseException) -> ApiError:
    """What a failed Serve call means to a client. What a worker raised comes as a RayTaskError, or as it is
    where calls go over gRPC."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, ApiError):
        return cause
    if isinstance(cause, ParameterError):
        return from_parameter_error(cause)
    if isinstance(error, BackPressureError):
        return overloaded("too many requests are waiting for this model")
    broken = isinstance(cause, grpc.aio.AioRpcError) and cause.code() in _AWAY_CODES
    if broken or isinstance(cause, _AWAY):
        return not_ready("the target worker is not available; send the request again", retry_after_s=2.0)
    logger.error("a call to a target worker failed", exc_info=error)
    return internal("the target worker failed")


class ServeModelClient:
    """A `ModelClient` over the handle of a target deployment."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._stream = handle.options(stream=True)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        response: Any = self._stream.generate.remote(request)
        finished = False
        try:
            async for chunk in response:
                yield chunk
            finished = True
        except Exception as error:
            finished = True
            raise to_api_error(error) from error
        finally:
            if not finished:
                response.cancel()

    async def _call(self, method: str, *args: object) -> Any:
        response = getattr(self._handle, method).remote(*args)
        finished = False
        try:
            result = await response
            finished = True
            return result
        except Exception as error:
            finished = True
            raise to_api_error(error) from error
        finally:
            if not finished:
                response.cancel()

    async def tokenize(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(await self._call("tokenize", text, add_special_tokens))

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return str(await self._call("detokenize", tuple(token_ids)))

    async def render_ids(
        self, messages: Sequence[ChatMessage], add_generation_prompt: bool
    ) -> tuple[int, ...]:
        return tuple(await self._call("render_ids", tuple(messages), add_generation_prompt))

    async def info(self) -> TargetInfo:
        info: TargetInfo = await self._call("info")
        return info

    async def _broadcast(self, method: str, *args: object) -> list[Any]:
        try:
            return await self._handle.broadcast(method, *args).results_async(timeout_s=10.0)
        except Exception as error:
            raise to_api_error(error) from error

    async def states(self) -> Sequence[TargetState]:
        return await self._broadcast("state")

    async def reset(self, scope: ResetScope) -> None:
        await self._broadcast("reset", scope)


class LeasedDraftPool:
    """Asks every leased draft worker for its state over its own gRPC port. A worker that does not answer
    appears with its lease and `error`."""

    def __init__(self, config: DraftPoolConfig, registry: RegistryClient) -> None:
        self._config = config
        self._registry = registry

    async def states(self) -> Sequence[Mapping[str, object]]:
        leases = await self._registry.living(max_age_s=0.0)
        return await asyncio.gather(*(self._state(lease) for lease in leases))

    async def _state(self, lease: Lease) -> Mapping[str, object]:
        body: dict[str, object] = {
            "id": lease.id,
            "incarnation": lease.incarnation,
            "address": lease.address,
            "exits": list(lease.exits),
            "load": lease.load,
            "error": None,
        }
        try:
            async with draft_channel(self._config, lease.address) as channel:
                stub = drafting_pb2_grpc.DraftServiceStub(channel)  # type: ignore[no-untyped-call]
                state = await stub.GetDraftWorkerState(
                    drafting_pb2.GetDraftWorkerStateRequest(),
                    timeout=DRAFT_STATE_TIMEOUT_S,
                    metadata=draft_metadata(self._config),
                )
        except grpc.aio.AioRpcError as error:
            body["error"] = error.code().name
        except OSError as error:  # the files of the certificate, which are replaced from time to time
            body["error"] = f"{grpc.StatusCode.UNAVAILABLE.name}: {error}"
        else:
            body |= state_body(state)
        return body


def state_body(state: drafting_pb2.DraftWorkerState) -> dict[str, object]:
    """All fields, zeros included, numbers as numbers."""
    return {
        field.name: list(value)
        if isinstance(value := getattr(state, field.name), Sequence) and not isinstance(value, str)
        else value
        for field in state.DESCRIPTOR.fields
    }


def draft_metadata(config: DraftPoolConfig) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {config.token}"),) if config.token else ()


@contextlib.asynccontextmanager
async def draft_channel(config: DraftPoolConfig, address: str) -> AsyncGenerator[grpc.aio.Channel, None]:
    if config.tls is None:
        channel = grpc.aio.insecure_channel(address)
    else:
        tls = config.tls
        pem = await asyncio.to_thread(lambda: [p.read_bytes() for p in (tls.ca, tls.key, tls.cert)])
        channel = grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(*pem))
    async with channel:
        yield channel
