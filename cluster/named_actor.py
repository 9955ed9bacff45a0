"""Calls to one named, detached actor that whoever comes first creates, and Ray starts again when it dies."""

from __future__ import annotations

import asyncio
from typing import Any

import ray

NAMESPACE = "s2d"
CALL_TIMEOUT_S = 1.0
_CREATE_TIMEOUTS = 10
"""Call timeouts that looking the actor up, or creating it, may take."""


class ActorUnavailableError(Exception):
    """The actor does not answer."""


class NamedActor:
    """A handle that survives the actor.

    Args:
        name: of the actor in the namespace `NAMESPACE`.
        actor: its class, without arguments.
        timeout_s: of a call.
    """

    def __init__(self, name: str, actor: type[Any], timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._name, self._class, self._timeout_s = name, actor, timeout_s
        self._handle: Any = None

    @property
    def reached(self) -> bool:
        """Whether the last call found the actor."""
        return self._handle is not None

    async def call(self, method: str, *args: object) -> Any:
        """Raises ActorUnavailableError; the handle is looked up again after that, since the actor may have
        been replaced."""
        try:
            if self._handle is None:
                async with asyncio.timeout(_CREATE_TIMEOUTS * self._timeout_s):
                    self._handle = await asyncio.to_thread(self._get_or_create)
            async with asyncio.timeout(self._timeout_s):
                return await getattr(self._handle, method).remote(*args)
        except (TimeoutError, ray.exceptions.RayError, ValueError) as error:
            # ValueError: the name was taken, and freed, between Ray's look and its use.
            self._handle = None
            raise ActorUnavailableError(f"{type(error).__name__}: {error}") from error

    def _get_or_create(self) -> Any:
        """Blocking: a few calls to Ray's control service."""
        return (
            ray.remote(self._class)
            .options(
                name=self._name,
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=0,
                max_restarts=-1,
                max_task_retries=0,
            )
            .remote()
        )
