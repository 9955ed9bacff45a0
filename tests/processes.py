"""Looking at processes from outside, for tests."""

from __future__ import annotations

import asyncio
import time
from asyncio.subprocess import Process
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest


def state(pid: int) -> str:
    """R, S, T (stopped), Z; "gone"."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "gone"


def eventually(true: Callable[[], object], seconds: float = 5.0) -> bool:
    """Whether it is so within so many seconds."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


async def cancelled_while_running(stop: Coroutine[object, object, None], process: Process) -> None:
    """Begin to stop a process that takes longer, and cancel that."""
    task = asyncio.create_task(stop)
    await asyncio.sleep(0.1)
    assert process.returncode is None
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
