"""This system in one configuration: requests to a shared server, with their own speculation settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from actors.engine.messages import ResetScope
from cluster.bench.engines.interface import BenchRequest, BenchResponse, EngineUnavailableError
from cluster.bench.engines.openai_endpoint import OpenAIEndpoint
from cluster.bench.engines.s2d_server import S2DServer

RESET_PATH = "/admin/reset"


class S2DEngine:
    """`speculation` is sent with every request, as the field of the same name."""

    def __init__(
        self, name: str, server: S2DServer, speculation: Mapping[str, Any], reset: ResetScope = "all"
    ) -> None:
        self._name = name
        self._server = server
        self._speculation = dict(speculation)
        self._reset = reset
        self._endpoint: OpenAIEndpoint | None = None
        self._holds_server = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def pid(self) -> int | None:
        return self._server.pid if self._holds_server else None

    @property
    def server(self) -> S2DServer:
        """Shared with other configurations."""
        return self._server

    async def start(self) -> None:
        await self._server.acquire()
        self._holds_server = True
        try:
            info = await self._server.info()
        except httpx.HTTPError as error:
            raise EngineUnavailableError(f"{self._name}: {error}") from error
        known = ("source", "dtype", "backend", "drafters", "row_invariant", "max_model_len")
        endpoint = OpenAIEndpoint(
            self._name,
            self._server.url,
            self._server.model,
            api_key=self._server.api_key,
            extra_body={"speculation": self._speculation},
            reset_path=f"{RESET_PATH}?scope={self._reset}",
            extra={"kind": "s2d serve", **{k: info[k] for k in known if k in info}},
            trust_env=False,  # a proxy does not reach this machine's own address
        )
        await endpoint.start()
        self._endpoint = endpoint

    async def stop(self) -> None:
        endpoint, self._endpoint = self._endpoint, None
        try:
            if endpoint is not None:
                await endpoint.stop()
        finally:
            if self._holds_server:
                self._holds_server = False
                await self._server.release()

    async def reset(self) -> None:
        await self._running.reset()

    async def generate(self, request: BenchRequest) -> BenchResponse:
        return await self._running.generate(request)

    def describe(self) -> Mapping[str, Any]:
        return self._running.describe()

    @property
    def _running(self) -> OpenAIEndpoint:
        if self._endpoint is None:
            raise RuntimeError(f"{self._name} is not started")
        return self._endpoint
