"""A Ray of its own for a test: own ports and directory, and every process of it found again and ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.bench.engines.s2d_server import free_ports

ROOT = Path(__file__).resolve().parents[2]
MARK = "S2D_TEST_RAY"
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0


def wait_until(condition: object, timeout_s: float, what: str, interval_s: float = 0.2) -> None:
    """Call `condition` until it is true. Raises AssertionError after `timeout_s`."""
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s"
        time.sleep(interval_s)


def script(name: str) -> str:
    """A console script of this Python environment."""
    return str(Path(sys.executable).parent / name)


def marked_processes(mark: str) -> list[int]:
    """Living processes with MARK set to this in their environment, which children inherit."""
    marked = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and marked in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # ended in between, or another user's
    return found


@dataclass(frozen=True)
class RayNode:
    """A head node. `env` makes `ray` and `serve` commands, and their children, talk to it."""

    env: Mapping[str, str]
    dashboard_url: str
    mark: str

    def run(self, *command: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [script(command[0]), *command[1:]],
            env=dict(self.env),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def processes(self) -> list[int]:
        """Living processes that this node started, directly or not."""
        return marked_processes(self.mark)

    def kill(self) -> None:
        """End every process of this node: SIGTERM, then SIGKILL for those that stay."""
        for number, patience_s in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, STOP_TIMEOUT_S)):
            deadline = time.monotonic() + patience_s
            for pid in self.processes():
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
            while self.processes() and time.monotonic() < deadline:
                time.sleep(0.2)
        assert not self.processes(), "processes of the test's Ray survived SIGKILL"


@contextmanager
def ray_head(num_cpus: int = 2) -> Iterator[RayNode]:
    """A head node with a dashboard (which `serve deploy` talks to)."""
    gcs, dashboard, agent_http, agent_grpc, runtime_env, metrics = free_ports(6)
    folder = Path(tempfile.mkdtemp(prefix="s2d-ray-", dir="/tmp"))  # socket paths must stay short
    mark = uuid.uuid4().hex
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    paths = [str(ROOT), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    env |= {
        MARK: mark,
        "PYTHONPATH": os.pathsep.join(paths),
        "RAY_ADDRESS": f"127.0.0.1:{gcs}",
        # Said outright: Ray's own choice depends on whether this user has run a Ray before.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": mark,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    node = RayNode(env, f"http://127.0.0.1:{dashboard}", mark)
    command = [
        script("ray"), "start", "--head", "--node-ip-address=127.0.0.1", f"--port={gcs}",
        f"--temp-dir={folder}", f"--num-cpus={num_cpus}", "--num-gpus=0", "--include-dashboard=true",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--object-store-memory={200 * 2**20}",
        f"--dashboard-agent-listen-port={agent_http}", f"--dashboard-agent-grpc-port={agent_grpc}",
        f"--runtime-env-agent-port={runtime_env}", f"--metrics-export-port={metrics}",
    ]  # fmt: skip
    try:
        started = subprocess.run(
            command, env=env, cwd=folder, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False
        )
        assert started.returncode == 0, started.stdout + started.stderr
        yield node
    finally:
        node.kill()
        shutil.rmtree(folder, ignore_errors=True)
