"""Generation calls that run: counted, so that what they run on is ended after them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from cluster.gateway.errors import ApiError, not_ready


def _shutting_down() -> ApiError:
    return not_ready("the service is shutting down", retry_after_s=10.0)


class InFlight:
    """Counts running generation calls and refuses new ones while draining. For one event loop.

    Args:
        refusal: makes the error of a call that comes while draining; by default a 503.
    """

    def __init__(self, refusal: Callable[[], ApiError] = _shutting_down) -> None:
        self.count = 0
        self.draining = False
        self._refusal = refusal
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def track(self) -> Iterator[None]:
        """Raises the refusal while draining."""
        if self.draining:
            raise self._refusal()
        self.count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.count -= 1
            if self.count == 0:
                self._idle.set()

    async def drain(self, timeout_s: float) -> int:
        """Refuse new calls and wait for the running ones; returns how many are left."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        return self.count
