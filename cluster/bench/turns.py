"""Whose turn it is: with exclusive turns, the processes of all other engines are stopped meanwhile.

An engine that waits is not free: our server's Ray processes poll, other engines' threads may spin. SIGSTOP
takes them off the processors and keeps their memory, so that turns can alternate as they do without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from cluster.bench.engines.interface import BenchEngine
from cluster.bench.guardian import Guardian
from cluster.processes import descendants

SETTLE_S = 1.0
"""After an engine was let go on: timers that ran out meanwhile fire at once, closed connections are seen."""
QUIET_S = 15.0
"""For what an engine does in idle moments after its start. Our own measures again, in some ten seconds, what
rounds cost; without idle moments it would do so while it and others are let go on, and believe it."""


class Turns:
    """`engines` must be started before the block is entered and stopped after it is left. Nobody is stopped
    outside of it: leaving it lets all go on, and if this process is killed, a second one does.

    Engines without processes of ours (an endpoint given by URL) are never stopped.
    """

    def __init__(
        self, engines: Sequence[BenchEngine] = (), exclusive: bool = False, settle_s: float = SETTLE_S
    ) -> None:
        self._engines = tuple(engines) if exclusive else ()
        self._settle_s = settle_s
        self._held: dict[int, list[int]] = {}
        self._guardian: Guardian | None = None

    def __enter__(self) -> Self:
        if self._engines:
            self._guardian = Guardian()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for root in tuple(self._held):
            self._resume(root)
        guardian, self._guardian = self._guardian, None
        if guardian is not None:
            guardian.close()

    async def give_to(self, engine: BenchEngine) -> None:
        """From now on, until the next call. Raises OSError when the guardian is gone: without it, nothing is
        stopped."""
        # Not in a thread: a cancelled call must not stop anything later. It takes some milliseconds.
        for root in dict.fromkeys(e.pid for e in self._engines):
            if root is not None and root != engine.pid and root not in self._held:
                self._suspend(root)
        if engine.pid is not None and engine.pid in self._held:
            self._resume(engine.pid)
            await asyncio.sleep(self._settle_s)

    async def begin(self, quiet_s: float = QUIET_S) -> None:
        """Every engine has the machine to itself for so long, without a request."""
        for engine in {e.pid: e for e in self._engines if e.pid is not None}.values():
            await self.give_to(engine)
            await asyncio.sleep(quiet_s)

    def _suspend(self, root: int) -> None:
        """A parent before its children, again until no process is new: what is stopped starts no other."""
        held = self._held.setdefault(root, [])
        while new := [pid for pid in (root, *descendants(root)) if pid not in held]:
            held += new
            self._tell_guardian()
            _send(new, signal.SIGSTOP)

    def _resume(self, root: int) -> None:
        _send(reversed(self._held.pop(root)), signal.SIGCONT)
        with contextlib.suppress(OSError):
            self._tell_guardian()

    def _tell_guardian(self) -> None:
        assert self._guardian is not None
        self._guardian.will_send((pid, signal.SIGCONT) for pids in self._held.values() for pid in pids)


def _send(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
