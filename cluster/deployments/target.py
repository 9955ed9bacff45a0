"""One served model as a Serve deployment: a thin shell around a `TargetWorker`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ray import serve

from actors.engine.messages import ResetScope
from actors.target_worker.messages import GenerationChunk, GenerationRequest, TargetInfo, TargetState
from actors.target_worker.startup import StartupClock
from actors.text.messages import ChatMessage
from cluster.config import DraftPoolConfig, ModelConfig, RouterConfig
from cluster.deployments.routing import TargetReports, TargetRouting, only_nested
from cluster.registry import LeaseWatcher, RegistryClient
from cluster.router_actor import RouterClient
from cluster.telemetry.metrics import TargetMetrics

logger = logging.getLogger(__name__)
METRICS_INTERVAL_S = 2.0
DRAIN_TIMEOUT_S = 25.0


class Target:
    """Loads its model in the constructor; Serve sends requests once that has returned.

    The init arguments name this model only: nothing else that is served may restart it.
    """

    async def __init__(  # type: ignore[misc]
        self,
        model: dict[str, Any],
        draft_pool: dict[str, Any],
        stream_interval_ms: float | None,
        router: dict[str, Any] | None = None,
    ) -> None:
        clock = StartupClock()
        # Imported here: it pulls in torch, which whoever only builds the application need not load.
        from cluster.deployments.wiring import build_target_worker

        config = ModelConfig.model_validate(model)
        pool = DraftPoolConfig.model_validate(draft_pool)
        replica_id = serve.get_replica_context().replica_tag
        self._leases = LeaseWatcher(RegistryClient())
        self._leases.start()
        self._worker = await asyncio.to_thread(
            build_target_worker,
            config,
            pool,
            self._leases.leases,
            replica_id=replica_id,
            stream_interval_ms=stream_interval_ms,
            clock=clock,
        )
        self._metrics = TargetMetrics(config.name)
        self._reporter = asyncio.create_task(self._report_forever())
        self._router: asyncio.Task[None] | None = None
        if router is not None:
            routing = TargetRouting(
                self._worker,
                RouterClient(RouterConfig.model_validate(router).interval_s),
                TargetReports(replica_id, config.name, config.speculation),
                only_nested=only_nested(pool),
            )
            self._router = asyncio.create_task(routing.run())

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """Cancelling the Serve call aborts the request in the engine at once."""
        stream = self._metrics.observe(self._worker.generate(request))
        try:
            async for chunk in stream:
                yield chunk
        finally:
            await stream.aclose()

    async def tokenize(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        return await self._worker.tokenize(text, add_special_tokens)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return await self._worker.detokenize(token_ids)

    async def render_ids(
        self, messages: Sequence[ChatMessage], add_generation_prompt: bool
    ) -> tuple[int, ...]:
        return await self._worker.render(messages, add_generation_prompt)

    async def info(self) -> TargetInfo:
        self._worker.check_health()
        return self._worker.info()

    async def state(self) -> TargetState:
        return await self._worker.state()

    async def reset(self, scope: ResetScope) -> None:
        await self._worker.reset(scope)

    async def check_health(self) -> None:
        self._worker.check_health()
        if self._reporter.done():
            raise RuntimeError("metrics are no longer reported")
        if self._router is not None and self._router.done():
            raise RuntimeError("nothing is reported to the router any more")

    async def _report_forever(self) -> None:
        while True:
            try:
                state = await self._worker.state()
            except Exception as error:  # a snapshot that failed is no reason to stop reporting
                logger.warning("no engine statistics: %s: %s", type(error).__name__, error)
            else:
                self._metrics.record_engine(state.engine)
            await asyncio.sleep(METRICS_INTERVAL_S)

    async def __del__(self) -> None:
        reporter = getattr(self, "_reporter", None)
        if reporter is None:  # the constructor failed
            return
        tasks = [task for task in (reporter, getattr(self, "_router", None)) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._leases.close()
        await self._worker.drain(DRAIN_TIMEOUT_S)
        await self._worker.close()
