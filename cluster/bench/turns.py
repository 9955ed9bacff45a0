"""Whose turn it is: with exclusive turns, the processes of all other engines are stopped meanwhile.

An engine that waits is not free: our server's Ray processes poll, other engines' threads may spin. SIGSTOP
takes them off the processors and keeps their memory, so that turns can alternate as they do without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster.bench.engines.interface import BenchEngine
from cluster.cli.local_cluster import descendants

SETTLE_S = 1.0
"""After an engine was let go on: timers that ran out meanwhile fire at once, closed connections are seen."""
GUARDIAN = Path(__file__).with_name("guardian.py")
GUARDIAN_EXIT_S = 5.0


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
        self._guardian: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if self._engines:
            # A session of its own: Ctrl-C at the terminal is not for it.
            self._guardian = subprocess.Popen(
                [sys.executable, "-I", "-S", str(GUARDIAN)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for root in tuple(self._held):
            self._resume(root)
        guardian, self._guardian = self._guardian, None
        if guardian is not None:
            with contextlib.suppress(OSError):
                assert guardian.stdin is not None
                guardian.stdin.close()
            try:
                guardian.wait(GUARDIAN_EXIT_S)
            except subprocess.TimeoutExpired:
                guardian.kill()
                guardian.wait()

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
        assert self._guardian.stdin is not None
        held = [pid for pids in self._held.values() for pid in pids]
        self._guardian.stdin.write(json.dumps(held).encode() + b"\n")
        self._guardian.stdin.flush()


def _send(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
