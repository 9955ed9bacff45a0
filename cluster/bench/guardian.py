"""Sends signals in place of a benchmark that is gone: what it has stopped goes on, what it has started ends.

A second process does it. This file is its script too, hence the standard library only. Standard input has one
JSON list of [process id, signal number] a line, the last of which counts. At its end, however it came about,
these processes get their signals, and the script ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

SCRIPT = Path(__file__)
EXIT_S = 5.0


class Guardian:
    """The benchmark's side."""

    def __init__(self) -> None:
        # A session of its own: Ctrl-C at the terminal is not for it.
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def will_send(self, signals: Iterable[tuple[int, int]]) -> None:
        """(process id, signal number) of all that is sent if this process ends before it says otherwise.
        Raises OSError when the guardian is gone."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(list(signals)).encode() + b"\n")
        self.process.stdin.flush()

    def close(self) -> None:
        """End it; it sends nothing."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.will_send(())
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def guard(lines: Iterable[str]) -> None:
    """The script's side."""
    pending: list[tuple[int, int, str | None]] = []
    for line in lines:
        pending = [(pid, number, started(pid)) for pid, number in json.loads(line)]
    for pid, number, at in pending:
        if at is not None and started(pid) == at:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)


def started(pid: int) -> str | None:
    """When a process began, in clock ticks, which tells it from a later one of the same id. None when there
    is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return None


if __name__ == "__main__":
    guard(sys.stdin)
