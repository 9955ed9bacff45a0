"""The draft pool as a Serve deployment: one draft worker a replica, kept alive and leased.

Serve only starts, restarts and stops the process; drafts never pass through it.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any

from ray import serve

from cluster.config import DraftPoolConfig
from cluster.registry import RENEW_INTERVAL_S, Lease, RegistryClient

logger = logging.getLogger(__name__)
STOP_GRACE_S = 2.0


class DraftPool:
    """One draft worker. The lease is renewed every second while the server runs."""

    async def __init__(self, config: dict[str, Any]) -> None:  # type: ignore[misc]
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
        self._renewer = asyncio.create_task(self._renew_forever())
        logger.info("draft worker %s listens on %s", worker_id, self._lease.address)

    async def _renew_forever(self) -> None:
        while True:
            load = float(self._server.state.sessions)
            await self._registry.renew(replace(self._lease, load=load))
            await asyncio.sleep(RENEW_INTERVAL_S)

    async def check_health(self) -> None:
        if self._renewer.done():
            raise RuntimeError("the lease is no longer renewed")

    async def __del__(self) -> None:
        renewer = getattr(self, "_renewer", None)
        if renewer is None:  # the constructor failed
            return
        renewer.cancel()
        await asyncio.gather(renewer, return_exceptions=True)
        await self._registry.release(self._lease.id, self._lease.incarnation)
        await self._server.stop(STOP_GRACE_S)
