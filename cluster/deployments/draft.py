"""The draft pool as a Serve deployment: one draft worker a replica, kept alive and leased.

Serve only starts, restarts and stops the process; drafts never pass through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import replace
from typing import Any

from ray import serve

from cluster.config import DraftPoolConfig, RouterConfig
from cluster.deployments.routing import DraftReports, Utilisation
from cluster.draft_scaling import UTILISATION
from cluster.named_actor import ActorUnavailableError
from cluster.registry import RENEW_INTERVAL_S, Lease, RegistryClient
from cluster.router_actor import RouterClient
from cluster.telemetry.metrics import DraftMetrics

logger = logging.getLogger(__name__)
STOP_GRACE_S = 2.0


class DraftPool:
    """One draft worker. The lease is renewed every second while the server runs."""

    async def __init__(  # type: ignore[misc]
        self, config: dict[str, Any], router: dict[str, Any] | None = None
    ) -> None:
        # Imported here: it pulls in torch, which whoever only builds the application need not load.
        from actors.draft_worker.server import build_draft_server

        self._config = DraftPoolConfig.model_validate(config)
        self._registry = RegistryClient()
        worker_id = serve.get_replica_context().replica_tag
        self._server = await asyncio.to_thread(build_draft_server, self._config, worker_id)
        nested = self._config.nested if "nested" in self._config.drafters else None
        self._lease = Lease(
            id=worker_id,
            incarnation=self._server.incarnation,
            address=await self._server.start(),
            exits=nested.resolved_exits() if nested is not None else (),
        )
        self._metrics = DraftMetrics(worker_id)
        self._utilisation = Utilisation()
        self._renewer = asyncio.create_task(self._renew_forever())
        self._router = (
            None if router is None else RouterClient(RouterConfig.model_validate(router).interval_s)
        )
        self._reporter: asyncio.Task[None] | None = None
        if self._router is not None:
            reports = DraftReports(worker_id, self._server, self._config)
            self._reporter = asyncio.create_task(reports.run(self._router))
        logger.info("draft worker %s listens on %s", worker_id, self._lease.address)

    async def _renew_forever(self) -> None:
        while True:
            state = self._server.state
            self._metrics.record(state)
            await self._registry.renew(replace(self._lease, load=float(state.sessions)))
            await asyncio.sleep(RENEW_INTERVAL_S)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For Serve's autoscaler, now and then: see `cluster.draft_scaling`."""
        return {UTILISATION: self._utilisation.since_last(time.monotonic(), self._server.state.busy_s)}

    async def check_health(self) -> None:
        state = self._server.state
        if not state.healthy:
            raise RuntimeError("the drafting thread is dead or hangs")
        if state.failing:
            raise RuntimeError(f"drafters that keep failing: {', '.join(state.failing)}")
        if self._renewer.done():
            raise RuntimeError("the lease is no longer renewed")
        if self._reporter is not None and self._reporter.done():
            raise RuntimeError("nothing is reported to the router any more")

    async def __del__(self) -> None:
        renewer = getattr(self, "_renewer", None)
        if renewer is None:  # the constructor failed
            return
        renewer.cancel()
        reporter = getattr(self, "_reporter", None)
        if reporter is not None:
            reporter.cancel()
        await asyncio.gather(*filter(None, (renewer, reporter)), return_exceptions=True)
        if self._router is not None:
            with contextlib.suppress(ActorUnavailableError):
                await self._router.forget_draft(self._lease.id)
        await self._registry.release(self._lease.id, self._lease.incarnation)
        await self._server.stop(STOP_GRACE_S)
