"""The benchmark's side of `cluster.bench.peers.host_protocol`: a script in a peer's own Python environment.

No HTTP lies between the benchmark and the peer, which favours the peer, and its token ids arrive exactly.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.bench.engines.interface import BenchRequest, BenchResponse, SpeculationCounts

LINE_LIMIT_BYTES = 1 << 24
NOT_INHERITED = frozenset({"OMP_WAIT_POLICY", "OMP_NUM_THREADS", "PYTHONPATH", "PYTHONHOME"})
"""What is set for our own processes and not for a peer. llama.cpp (BF16, one stream, alone on two cores, six
alternating runs): 0.82 of its own speed with OMP_WAIT_POLICY=PASSIVE (0.73 to 0.87), 1.01 with ACTIVE (0.87
to 1.08). Its threads spin for a while by default; `--exclusive` keeps that from others."""
STDERR_LINES = 200
ERROR_LINES = 15
"""Of standard error, how many lines are kept and how many an error message shows."""


class HostError(RuntimeError):
    """The script did not start, ended, or did not answer; the message ends with its last error output."""


@dataclass(frozen=True, slots=True)
class HostTimeouts:
    """Seconds. start_s: until it is ready. request_s: a whole request, queueing included. reset_s: the answer
    to a reset. stop_s: until each harder way to end it is tried."""

    start_s: float = 300.0
    request_s: float = 600.0
    reset_s: float = 30.0
    stop_s: float = 12.0


class PeerHost:
    """One script and the requests to it, which may overlap. It runs in a session of its own, so that stopping
    reaches every process that it started."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        timeouts: HostTimeouts | None = None,
    ) -> None:
        self._command = tuple(command)
        self._environment = dict(environment or {})
        self._timeouts = timeouts or HostTimeouts()
        self._process: asyncio.subprocess.Process | None = None
        self.stderr: deque[str] = deque(maxlen=STDERR_LINES)
        """The script's last error output."""
        self._tasks: list[asyncio.Task[None]] = []
        self._hello: asyncio.Future[dict[str, Any]] | None = None
        self._answers: dict[str, asyncio.Queue[tuple[float, dict[str, Any]]]] = {}
        self._serials = itertools.count()
        self._failure: str | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def start(self) -> dict[str, Any]:
        """The script's "hello": versions and options. Raises HostError; then nothing is left running."""
        if self._process is not None:
            raise RuntimeError("the script was started before")
        self._hello = asyncio.get_running_loop().create_future()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={k: v for k, v in os.environ.items() if k not in NOT_INHERITED} | self._environment,
                start_new_session=True,
                limit=LINE_LIMIT_BYTES,
            )
        except OSError as error:
            raise HostError(f"cannot run {self._command[0]}: {error}") from error
        self._tasks = [
            asyncio.create_task(self._read_errors(self._process)),
            asyncio.create_task(self._read_answers(self._process)),
        ]
        try:
            async with asyncio.timeout(self._timeouts.start_s):
                return await self._hello
        except TimeoutError:
            await self.stop()
            raise HostError(self._with_stderr(f"not ready after {self._timeouts.start_s:.0f} s")) from None
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Asks the script to end, then ends it and whatever it started. Never raises for a script that is
        gone."""
        process, self._process = self._process, None
        if process is None:
            return
        self._failure = self._failure or "stopped"
        with contextlib.suppress(OSError):
            assert process.stdin is not None
            process.stdin.write(b'{"op":"stop"}\n')
            process.stdin.close()
        try:
            for attempt in (None, signal.SIGTERM, signal.SIGKILL):
                if attempt is not None:
                    _signal_group(process.pid, attempt)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._timeouts.stop_s):
                        await process.wait()
                        break
        finally:  # children that outlived the script; all of it when this is cancelled
            _signal_group(process.pid, signal.SIGKILL)
        await asyncio.wait(self._tasks, timeout=self._timeouts.stop_s)
        for task in self._tasks:
            task.cancel()

    async def reset(self) -> None:
        """Raises HostError when the script does not confirm it."""
        key = f"reset-{next(self._serials)}"
        try:
            async with asyncio.timeout(self._timeouts.reset_s):
                answers = await self._send(key, {"op": "reset", "id": key})
                _, message = await answers.get()
        except TimeoutError:
            raise HostError(f"no answer to a reset within {self._timeouts.reset_s:.0f} s") from None
        finally:
            self._answers.pop(key, None)
        if message["event"] == "error":
            raise HostError(message["message"])

    async def generate(self, request: BenchRequest) -> BenchResponse:
        """As `BenchEngine.generate`."""
        # Ids of the wire are ours: a request id that is used twice, or again after a timeout, is no trouble.
        key = f"{request.request_id}#{next(self._serials)}"
        response = BenchResponse(request.request_id, time.perf_counter())
        message = {
            "op": "generate",
            "id": key,
            "prompt_ids": list(request.prompt_ids),
            "max_tokens": request.max_tokens,
            "ignore_eos": request.ignore_eos,
            "temperature": request.temperature,
            "seed": request.seed,
        }
        try:
            async with asyncio.timeout(self._timeouts.request_s):
                answers = await self._send(key, message)
                await _collect(answers, response)
        except TimeoutError:
            response.error = f"not finished after {self._timeouts.request_s:.0f} s"
            self._cancel(key)
        except HostError as error:
            response.error = str(error)
        except asyncio.CancelledError:
            self._cancel(key)
            raise
        finally:
            self._answers.pop(key, None)
        return response

    async def _send(
        self, key: str, message: Mapping[str, Any]
    ) -> asyncio.Queue[tuple[float, dict[str, Any]]]:
        """Send, and open the queue of the answers to `key`."""
        if self._process is None or self._failure is not None:
            raise HostError(self._failure or "not started")
        assert self._process.stdin is not None
        answers = self._answers[key] = asyncio.Queue()
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            await self._process.stdin.drain()
        except OSError as error:
            raise HostError(self._with_stderr(f"it does not read any more ({error})")) from error
        return answers

    def _cancel(self, key: str) -> None:
        if self._process is not None and self._process.stdin is not None and self._failure is None:
            with contextlib.suppress(OSError):
                self._process.stdin.write(json.dumps({"op": "cancel", "id": key}).encode() + b"\n")

    async def _read_answers(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        assert self._hello is not None
        try:
            async for line in process.stdout:
                now = time.perf_counter()
                message = json.loads(line)
                if message["event"] == "hello":
                    if not self._hello.done():
                        self._hello.set_result(message)
                elif (answers := self._answers.get(message["id"])) is not None:
                    answers.put_nowait((now, message))
        except (ValueError, KeyError, TypeError) as error:
            reason = f"it broke the protocol ({type(error).__name__}: {error})"
        else:
            with contextlib.suppress(TimeoutError):  # its output may end a little before it does
                async with asyncio.timeout(self._timeouts.stop_s):
                    await process.wait()
                    await self._tasks[0]
            reason = f"it ended with exit status {process.returncode}"
        self._fail(self._with_stderr(reason))

    async def _read_errors(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while chunk := await process.stderr.read(1 << 16):
            for line in chunk.decode(errors="replace").splitlines():
                if line.strip():
                    self.stderr.append(line.rstrip())

    def _fail(self, reason: str) -> None:
        self._failure = self._failure or reason
        if self._hello is not None and not self._hello.done():
            self._hello.set_exception(HostError(reason))
            self._hello.exception()  # read, so that a start that has given up leaves no warning
        for answers in self._answers.values():
            answers.put_nowait((time.perf_counter(), {"event": "error", "message": reason}))

    def _with_stderr(self, reason: str) -> str:
        shown = list(self.stderr)[-ERROR_LINES:]
        return "\n  ".join([reason + ("; its last output:" if shown else ""), *shown])


async def _collect(answers: asyncio.Queue[tuple[float, dict[str, Any]]], response: BenchResponse) -> None:
    ids: list[int] = []
    while response.finish_reason is None:
        when, message = await answers.get()
        if message["event"] == "error":
            raise HostError(message["message"])
        if message["event"] == "tokens":
            ids += message["token_ids"]
            response.arrivals.append((when, len(message["token_ids"])))
            response.token_ids = tuple(ids)
        else:
            response.finish_reason = message["finish_reason"]
            response.speculation = _counts(message.get("speculation"))


def _counts(message: Mapping[str, Any] | None) -> SpeculationCounts | None:
    if message is None:
        return None
    return SpeculationCounts(
        message["rounds"],
        message["drafted"],
        message["accepted"],
        tuple(message["accepted_by_position"]),
    )


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
