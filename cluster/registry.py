"""Who drafts where: leases of draft workers in one named actor.

A draft worker renews its lease every second; a lease that is not renewed for `LEASE_TTL_S` is gone. Losing
the registry loses nothing: workers renew into a new one, and targets go on with what they last read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.named_actor import CALL_TIMEOUT_S, ActorUnavailableError, NamedActor

REGISTRY_NAME = "s2d-registry"
LEASE_TTL_S = 3.0
RENEW_INTERVAL_S = 1.0
MAX_LEASES = 1024


@dataclass(frozen=True, slots=True)
class Lease:
    """A living draft worker. `incarnation` changes when its process is replaced, `load` is its number of
    open sessions, `exits` are the depths (layers) of its nested drafter."""

    id: str
    incarnation: str
    address: str
    exits: tuple[int, ...] = ()
    load: float = 0.0


class LeaseTable:
    """Leases and when they end. Plain logic, no Ray; `clock` in seconds."""

    def __init__(self, ttl_s: float = LEASE_TTL_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._leases: dict[str, tuple[Lease, float]] = {}

    def renew(self, lease: Lease) -> None:
        """Raises RuntimeError when the table is full."""
        self._expire()
        if lease.id not in self._leases and len(self._leases) >= MAX_LEASES:
            raise RuntimeError("too many draft workers")
        self._leases[lease.id] = (lease, self._clock() + self._ttl_s)

    def release(self, worker_id: str, incarnation: str) -> None:
        """Give a lease back, unless a newer process holds it."""
        held = self._leases.get(worker_id)
        if held is not None and held[0].incarnation == incarnation:
            del self._leases[worker_id]

    def living(self) -> list[Lease]:
        self._expire()
        return [lease for lease, _ in self._leases.values()]

    def _expire(self) -> None:
        now = self._clock()
        self._leases = {k: v for k, v in self._leases.items() if v[1] > now}


class RegistryActor:
    """The lease table as an actor; created by whoever asks first."""

    def __init__(self) -> None:
        self._table = LeaseTable()

    async def renew(self, lease: Lease) -> None:
        self._table.renew(lease)

    async def release(self, worker_id: str, incarnation: str) -> None:
        self._table.release(worker_id, incarnation)

    async def living(self) -> list[Lease]:
        return self._table.living()


class RegistryClient:
    """Calls to the registry that never take longer than `timeout_s` and never raise for its absence."""

    def __init__(self, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._actor = NamedActor(REGISTRY_NAME, RegistryActor, timeout_s)
        self._cached: list[Lease] = []
        self._cached_at = float("-inf")

    async def renew(self, lease: Lease) -> bool:
        """Whether the registry took it."""
        try:
            await self._actor.call("renew", lease)
        except ActorUnavailableError:
            return False
        return True

    async def release(self, worker_id: str, incarnation: str) -> bool:
        try:
            await self._actor.call("release", worker_id, incarnation)
        except ActorUnavailableError:
            return False
        return True

    async def living(self, max_age_s: float = RENEW_INTERVAL_S) -> Sequence[Lease]:
        """Living draft workers, read at most every `max_age_s`. While the registry does not answer, what was
        last read: an address that no longer answers costs a reconnect attempt and nothing else."""
        if time.monotonic() - self._cached_at >= max_age_s:
            try:
                self._cached = await self._actor.call("living")
            except ActorUnavailableError:
                self._cached_at = time.monotonic()
                return self._cached
            self._cached_at = time.monotonic()
        return self._cached


class LeaseWatcher:
    """Keeps the living leases at hand for code that cannot await, such as an engine thread."""

    def __init__(self, client: RegistryClient, interval_s: float = RENEW_INTERVAL_S) -> None:
        self._client = client
        self._interval_s = interval_s
        self._leases: tuple[Lease, ...] = ()
        self._task: asyncio.Task[None] | None = None

    def leases(self) -> list[dict[str, object]]:
        """The draft workers that lived a moment ago, as mappings. Thread-safe."""
        return [
            {"id": x.id, "incarnation": x.incarnation, "address": x.address, "exits": x.exits, "load": x.load}
            for x in self._leases
        ]

    def start(self) -> None:
        """Begin watching on the running event loop; a second call does nothing."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._watch())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _watch(self) -> None:
        while True:
            self._leases = tuple(await self._client.living(max_age_s=0.0))
            await asyncio.sleep(self._interval_s)
