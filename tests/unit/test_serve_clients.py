"""What the gateway makes of Serve calls that fail as they do over gRPC: with the worker's own exception."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator
from typing import Any

import grpc
import httpx
import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError

from actors.engine.async_engine import EngineUnavailable
from actors.sampling.params import ParameterError, SamplingParams
from actors.target_worker.messages import GenerationRequest
from cluster.config import GatewayConfig
from cluster.gateway.errors import ApiError, overloaded
from cluster.gateway.http_app import build_http_app
from cluster.gateway.in_flight import InFlight
from cluster.gateway.models import ModelDirectory
from cluster.gateway.routes import Gateway
from cluster.gateway.serve_clients import ServeModelClient
from tests.unit.fake_target import FakeDraftPool, FakeTarget, info


class FakeHandle:
    """A handle whose calls fail with `error`, but for those of `answers`."""

    def __init__(self, error: BaseException, **answers: object) -> None:
        self.error, self.answers = error, answers
        self.cancelled = 0

    def options(self, **_: object) -> FakeHandle:
        return self

    def __getattr__(self, method: str) -> Any:
        return FakeCall(self, method)

    def broadcast(self, method: str, *_: object) -> FakeCall:
        return FakeCall(self, method)


class FakeCall:
    """A method of a handle, and its response."""

    def __init__(self, handle: FakeHandle, method: str) -> None:
        self._handle, self._method = handle, method

    def remote(self, *_: object) -> FakeCall:
        return self

    async def results_async(self, timeout_s: float) -> object:
        if self._method in self._handle.answers:
            return self._handle.answers[self._method]
        raise self._handle.error

    def __await__(self) -> Generator[Any, None, object]:
        return self.results_async(1.0).__await__()

    def __aiter__(self) -> AsyncIterator[object]:
        return self

    async def __anext__(self) -> object:
        return await self

    def cancel(self) -> None:
        self._handle.cancelled += 1


async def fail(client: ServeModelClient, method: str) -> None:
    if method == "generate":
        async for _ in client.generate(GenerationRequest("id", SamplingParams(), "hi")):
            pass
    else:
        await getattr(client, method)()


def rpc_error(code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "secret", None)


@pytest.mark.parametrize("method", ["generate", "info", "states"])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("secret: the engine is dead or hangs"), 500),
        (EngineUnavailable("secret"), 503),
        (TimeoutError("secret"), 503),
        (rpc_error(grpc.StatusCode.CANCELLED), 503),
        (rpc_error(grpc.StatusCode.RESOURCE_EXHAUSTED), 500),
        (ActorUnavailableError("secret", None), 503),
        (BackPressureError(1, 1), 429),
        (ParameterError("messages", "the model has no chat template"), 400),
        (RayTaskError("info", "secret", ParameterError("n", "is too large"), ip="::1"), 400),  # type: ignore[no-untyped-call]
        (RayTaskError("info", "secret", EngineUnavailable("secret"), ip="::1"), 503),  # type: ignore[no-untyped-call]
        (overloaded("full"), 429),
    ],
)
async def test_what_a_failed_call_means(error: Exception, status: int, method: str) -> None:
    handle: Any = FakeHandle(error)
    with pytest.raises(ApiError) as failed:
        await fail(ServeModelClient(handle), method)
    assert failed.value.status == status
    assert "secret" not in str(failed.value)
    assert handle.cancelled == 0, "what has ended is not cancelled"


@pytest.mark.parametrize("method", ["generate", "info", "states"])
async def test_a_cancellation_stays_one(method: str) -> None:
    handle: Any = FakeHandle(asyncio.CancelledError())
    with pytest.raises(asyncio.CancelledError):
        await fail(ServeModelClient(handle), method)
    assert handle.cancelled == (method != "states")


async def no_metrics() -> str:
    return ""


def http(**handles: Any) -> httpx.AsyncClient:
    """A gateway before workers of these names, and one that is well."""
    clients = {name: ServeModelClient(handle) for name, handle in handles.items()}
    served = Gateway(
        config=GatewayConfig(),
        directory=ModelDirectory({**clients, "well": FakeTarget("well")}),
        draft_pool=FakeDraftPool(),
        in_flight=InFlight(),
    )
    transport = httpx.ASGITransport(build_http_app(served, no_metrics), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def test_one_dead_engine_hides_no_other() -> None:
    async with http(ill=FakeHandle(EngineUnavailable("the engine has stopped"))) as client:
        state = await client.get("/state")
        assert state.status_code == 200
        ill, well = state.json()["models"]
        assert (ill["replicas"], ill["error"] is None) == ([], False)
        assert (len(well["replicas"]), well["error"]) == (2, None)
        assert 'model_name="well"' in (await client.get("/metrics")).text


async def test_a_model_without_a_chat_template_refuses_messages() -> None:
    missing = ParameterError("messages", "the model has no chat template")
    async with http(plain=FakeHandle(missing, info=info("plain"))) as client:
        body = {"model": "plain", "messages": [{"role": "user", "content": "hi"}]}
        answer = await client.post("/tokenize", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
