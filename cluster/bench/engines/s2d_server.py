"""`s2d serve` as a process of its own, shared by all configurations that are measured on it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import yaml

from cluster.bench.engines.interface import EngineUnavailableError
from cluster.bench.guardian import Guardian
from cluster.config import ClusterConfig
from cluster.processes import descendants, end_processes

SERVE = (sys.executable, "-m", "cluster.cli.main", "serve")
READY_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0
POLL_S = 0.3
PORTS = range(20_000, 32_000)
DRAFT_PORTS = 20
"""Ports beside each other that the draft workers may choose from."""
_LOG_CHARS = 2000


class S2DServer:
    """Started by the first `acquire`, stopped by the last `release`, and ended by a guardian if this process
    is killed before. For one event loop.

    The given configuration is served as it is, apart from the ports, which are chosen free, and the admin
    endpoints, which are switched on. It is asked every `poll_s` seconds whether it is ready.
    """

    def __init__(self, config: ClusterConfig, poll_s: float = POLL_S) -> None:
        self._config = config
        self._poll_s = poll_s
        self._users = 0
        self._lock = asyncio.Lock()
        self._process: Process | None = None
        self._guardian: Guardian | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.url = ""

    @property
    def model(self) -> str:
        return self._config.models[0].name

    @property
    def pid(self) -> int:
        """Of `s2d serve`, whose descendants are all processes of the server."""
        if self._process is None:
            raise RuntimeError("the server is not running")
        return self._process.pid

    @property
    def output(self) -> str:
        """What `s2d serve` has printed so far; empty before it starts."""
        if self._folder is None or not self._log.exists():
            return ""
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def api_key(self) -> str | None:
        return self._config.gateway.api_key

    @property
    def headers(self) -> dict[str, str]:
        """What a client must send."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    async def acquire(self) -> None:
        """Raises EngineUnavailableError when the server does not become ready."""
        async with self._lock:
            if self._users == 0:
                try:
                    await self._start()
                except BaseException:
                    await self._stop()
                    raise
            self._users += 1

    async def release(self) -> None:
        async with self._lock:
            self._users = max(0, self._users - 1)
            if self._users == 0:
                await self._stop()

    async def info(self) -> Mapping[str, Any]:
        """What the server says of its model: dtype, backend, drafters. Raises httpx.HTTPError."""
        return await self._get(f"/v1/models/{self.model}")

    async def state(self) -> Mapping[str, Any]:
        """The body of GET /state, live. Raises httpx.HTTPError."""
        return await self._get("/state")

    async def _get(self, path: str) -> Mapping[str, Any]:
        async with httpx.AsyncClient(
            base_url=self.url, timeout=10.0, headers=self.headers, trust_env=False
        ) as client:
            answer = await client.get(path)
            return dict(answer.raise_for_status().json())

    async def _start(self) -> None:
        http_port, grpc_port, draft_port = free_ports(3)
        data = self._config.model_dump(mode="json")
        data["gateway"] |= {
            "host": "127.0.0.1",
            "http_port": http_port,
            "grpc_port": grpc_port,
            "admin_endpoints": True,
        }
        data["draft_pool"]["port_range"] = [draft_port, min(draft_port + DRAFT_PORTS, 65535)]
        self._folder = tempfile.TemporaryDirectory(prefix="s2d-bench-")
        file = Path(self._folder.name) / "cluster.yaml"
        file.write_text(yaml.safe_dump(data), encoding="utf-8")
        self._guardian = Guardian()
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(*SERVE, "-c", str(file)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
                # Ctrl-C at the terminal is for the benchmark, which then stops the server.
                start_new_session=True,
            )
        self._guardian.will_send([(self._process.pid, signal.SIGTERM)])
        self.url = f"http://127.0.0.1:{http_port}"
        await self._wait_ready(self._process)

    async def _wait_ready(self, process: Process) -> None:
        try:
            async with (
                asyncio.timeout(READY_TIMEOUT_S),
                httpx.AsyncClient(timeout=5.0, trust_env=False) as client,
            ):
                while True:
                    if process.returncode is not None:
                        raise EngineUnavailableError(f"`s2d serve` ended: {self._last_output()}")
                    with contextlib.suppress(httpx.HTTPError):
                        if (await client.get(f"{self.url}/ready")).status_code == 200:
                            return
                    await asyncio.sleep(self._poll_s)
        except TimeoutError as error:
            raise EngineUnavailableError(
                f"`s2d serve` was not ready within {READY_TIMEOUT_S:g} s: {self._last_output()}"
            ) from error

    async def _stop(self) -> None:
        process, self._process = self._process, None
        try:
            if process is not None and process.returncode is None:
                await _end(process)
        finally:
            if self._guardian is not None:
                self._guardian.close()
                self._guardian = None
            if self._folder is not None:
                self._folder.cleanup()
                self._folder = None

    @property
    def _log(self) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / "serve.log"

    def _last_output(self) -> str:
        return self.output.strip()[-_LOG_CHARS:]


async def _end(process: Process) -> None:
    """End the process and all below it. Cancelled meanwhile, kill what is left at once."""
    below = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    try:
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        await asyncio.to_thread(end_processes, below, 5.0)
    except asyncio.CancelledError:
        if process.returncode is None:
            below |= descendants(process.pid)
            process.kill()
        end_processes(below, 0.0)
        raise


def free_ports(count: int) -> list[int]:
    """Distinct TCP ports that nobody listens on now, apart from those that the kernel and Ray hand out."""
    with ExitStack() as stack:
        ports: list[int] = []
        for port in random.sample(PORTS, len(PORTS)):
            held = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                held.bind(("127.0.0.1", port))
                ports.append(port)
            if len(ports) == count:
                return ports
    raise EngineUnavailableError(f"no {count} free ports from {PORTS.start} to {PORTS.stop}")
