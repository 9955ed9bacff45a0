"""The router as one named actor, and how the others reach it.

Losing it loses nothing: target workers go on with their last assignment, Ray starts it again, and it takes
over where it stopped from a copy of its state in Ray's control service (GCS), which outlives actor and node.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

from ray.experimental import internal_kv

from cluster.named_actor import CALL_TIMEOUT_S, NAMESPACE, NamedActor
from cluster.router.reports import Assignment, DraftReport, Pin, TargetReport
from cluster.router.service import PinError, RouterService
from cluster.telemetry.router_metrics import RouterMetrics

logger = logging.getLogger(__name__)
ROUTER_NAME = "s2d-router"
STATE_KEY = "s2d-router-state"
SAVE_INTERVAL_S = 1.0


def load_state() -> RouterService:
    """A router from the saved state; a new one where there is none, or it cannot be read."""
    try:
        saved = internal_kv._internal_kv_get(STATE_KEY, namespace=NAMESPACE)
        return RouterService() if saved is None else RouterService.restore(json.loads(saved))
    except Exception as error:  # whatever it is: a router that starts anew is better than none
        logger.warning("the router's saved state is not used: %s: %s", type(error).__name__, error)
        return RouterService()


def save_state(data: str) -> None:
    """Blocking: one call to the control service, which waits for it when it is away."""
    internal_kv._internal_kv_put(STATE_KEY, data, overwrite=True, namespace=NAMESPACE)


class RouterActor:
    """`RouterService` on the actor's event loop."""

    def __init__(self) -> None:
        self._service = load_state()
        self._metrics = RouterMetrics()
        self._now = 0.0
        self._steps_seen = 0
        self._saving: asyncio.Task[None] | None = None
        self._saved_at = float("-inf")

    def _time(self) -> float:
        """time.time() that never goes back."""
        self._now = max(self._now, time.time())
        return self._now

    async def report_target(self, report: TargetReport, interval_s: float) -> Assignment | None:
        """See `RouterService.report_target`."""
        assignment = self._service.report_target(self._time(), report, interval_s)
        self._after()
        return assignment

    async def report_draft(self, report: DraftReport, interval_s: float) -> None:
        self._service.report_draft(self._time(), report, interval_s)
        self._after()

    async def forget_draft(self, worker_id: str) -> None:
        self._service.forget_draft(worker_id)

    async def pin(self, target: str, pin: Pin) -> PinError | None:
        """None when it is pinned, otherwise why not."""
        try:
            self._service.pin(self._time(), target, pin)
        except PinError as error:
            return error
        self._after(pinned=True)
        return None

    async def unpin(self, target: str) -> PinError | None:
        try:
            self._service.unpin(self._time(), target)
        except PinError as error:
            return error
        self._after(pinned=True)
        return None

    async def view(self) -> dict[str, Any]:
        return self._service.view(self._time())

    def _after(self, pinned: bool = False) -> None:
        """Publish and save what a step decided."""
        stepped = self._service.steps != self._steps_seen
        self._steps_seen = self._service.steps
        if stepped:
            self._metrics.record(self._service.decisions, self._service.planned_load())
        if (stepped or pinned) and self._saving is None:
            self._saving = asyncio.create_task(self._save())

    async def _save(self) -> None:
        """At most once in `SAVE_INTERVAL_S`; what changes meanwhile goes along."""
        try:
            await asyncio.sleep(max(0.0, self._saved_at + SAVE_INTERVAL_S - time.monotonic()))
            self._saved_at = time.monotonic()
            # Written out here: the state goes on changing while the thread waits.
            await asyncio.to_thread(save_state, json.dumps(self._service.export_state()))
        except Exception as error:  # the next step tries again
            logger.warning("the router's state was not saved: %s: %s", type(error).__name__, error)
        finally:
            self._saving = None


class RouterClient:
    """Calls to the router that never take longer than about `timeout_s`."""

    def __init__(self, interval_s: float, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._interval_s = interval_s
        self._actor = NamedActor(ROUTER_NAME, RouterActor, timeout_s)

    @property
    def interval_s(self) -> float:
        """How often workers report, in seconds."""
        return self._interval_s

    async def report_target(self, report: TargetReport) -> Assignment | None:
        """The assignment; None before the first one. Raises ActorUnavailableError."""
        assignment: Assignment | None = await self._actor.call("report_target", report, self._interval_s)
        return assignment

    async def report_draft(self, report: DraftReport) -> None:
        """Raises ActorUnavailableError."""
        await self._actor.call("report_draft", report, self._interval_s)

    async def forget_draft(self, worker_id: str) -> None:
        """Raises ActorUnavailableError. A router that was not reached so far is not started for this."""
        if self._actor.reached:
            await self._actor.call("forget_draft", worker_id)

    async def pin(self, target: str, pin: Pin) -> None:
        """Raises PinError, ActorUnavailableError."""
        self._raise(await self._actor.call("pin", target, pin))

    async def unpin(self, target: str) -> None:
        """Raises PinError, ActorUnavailableError."""
        self._raise(await self._actor.call("unpin", target))

    async def view(self) -> dict[str, Any]:
        """See `RouterService.view`. Raises ActorUnavailableError."""
        body: dict[str, Any] = await self._actor.call("view")
        return body

    @staticmethod
    def _raise(error: PinError | None) -> None:
        if error is not None:
            raise error
