"""The benchmark's own server: how it is reached, and that it ends whatever becomes of the benchmark."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.bench.config import SoakSettings
from cluster.bench.engines.interface import EngineUnavailableError
from cluster.bench.engines.openai_endpoint import OpenAIEndpoint
from cluster.bench.engines.s2d import S2DEngine
from cluster.bench.engines.s2d_server import S2DServer
from cluster.bench.soak.command import soak
from cluster.bench.soak.report import SoakResults
from cluster.bench.start.command import _first_token
from cluster.config import ClusterConfig
from tests.processes import cancelled_while_running, eventually, state

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 60.0
CHOICE = {"text": "x", "delta": {"content": "x"}, "finish_reason": "stop"}


class Handler(BaseHTTPRequestHandler):
    """Answers whatever is asked."""

    def do_GET(self) -> None:
        self._answer(json.dumps({"data": [{"id": "m"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        answer = json.dumps({"choices": [CHOICE]})
        self._answer(f"data: {answer}\n\ndata: [DONE]\n\n" if body.get("stream") else answer)

    def _answer(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def stub() -> Iterator[str]:
    """URL of a server in this process."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def dead_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        for spelling in (name, name.upper()):
            monkeypatch.delenv(spelling, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")


async def started(*command: str) -> tuple[S2DServer, asyncio.subprocess.Process]:
    """A server that has been acquired once, with a stand-in for `s2d serve`."""
    server = S2DServer(ClusterConfig.default())
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    server._process, server._users = process, 1
    return server, process


@pytest.fixture
async def stub_server(stub: str) -> AsyncIterator[S2DServer]:
    server, _ = await started("sleep", "600")
    server.url = stub
    yield server
    await server.release()


@pytest.mark.usefixtures("dead_proxy")
async def test_our_own_server_is_reached_past_the_environments_proxy(stub_server: S2DServer) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        process = stub_server._process
        assert process is not None
        await stub_server._wait_ready(process)
        assert await stub_server.state()
        engine = S2DEngine("s2d-auto", stub_server, {})
        await engine.start()
        await engine.reset()
        await engine.stop()
        assert await _first_token(stub_server) > 0
        results = SoakResults(20)
        await soak(stub_server, SoakSettings(requests=20, concurrency=1), results, lambda: None)
        assert results.failures == []


@pytest.mark.usefixtures("dead_proxy")
async def test_an_endpoint_by_url_goes_through_the_environments_proxy(stub: str) -> None:
    with pytest.raises(EngineUnavailableError, match="no answer"):
        await OpenAIEndpoint("theirs", stub).start()


DEAF = """
import signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
time.sleep(600)
"""


async def test_a_stop_that_is_cancelled_kills_all_processes() -> None:
    server, process = await started(sys.executable, "-S", "-c", DEAF)
    assert process.stdout is not None
    child = int(await process.stdout.readline())
    await cancelled_while_running(server.release(), process)
    async with asyncio.timeout(TIMEOUT_S):
        await process.wait()
    assert eventually(lambda: state(child) in ("Z", "gone"))


STAND_IN = """
import os, pathlib, signal, sys, time
def asked(*_):
    pathlib.Path(os.environ["SEEN"]).write_text("asked to end")
    sys.exit()
signal.signal(signal.SIGTERM, asked)
pathlib.Path(os.environ["SEEN"]).write_text("up")
time.sleep(600)
"""
BENCHMARK = """
import asyncio, os, sys
from cluster.bench.engines import s2d_server
from cluster.config import ClusterConfig
s2d_server.SERVE = (sys.executable, "-S", "-c", os.environ["STAND_IN"])
asyncio.run(s2d_server.S2DServer(ClusterConfig.default()).acquire())
"""


def test_a_server_ends_when_its_benchmark_is_killed(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    seen.touch()
    environment = {**os.environ, "SEEN": str(seen), "STAND_IN": STAND_IN, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", BENCHMARK], cwd=ROOT, env=environment) as benchmark:
        try:
            assert eventually(lambda: seen.read_text() == "up", TIMEOUT_S)
        finally:
            benchmark.kill()
    assert eventually(lambda: seen.read_text() == "asked to end", TIMEOUT_S)
