"""The gateway dies under load, with SIGKILL: open requests fail, what ran for them is given up, and the next
requests are served by the gateway that Ray Serve starts in its place."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.chaos.streams import fields
from tests.integration.ray_node import wait_until
from tests.integration.server import MODEL, serve

pytestmark = [pytest.mark.serve, pytest.mark.slow]

BACK_WITHIN_S = 60.0


def test_the_service_comes_back_without_its_gateway(tmp_path: Path) -> None:
    with serve(tmp_path, max_model_len=1024) as server:
        expected = server.complete(**fields(0))["choices"][0]["text"]
        (gateway,) = server.processes_of("gateway")
        (target,) = server.processes_of(f"target-{MODEL}")

        def stream(seed: int) -> bool:
            """Whether the whole answer came."""
            body = {"model": MODEL, **fields(seed), "stream": True}
            with server.client(300.0) as client:
                try:
                    with client.stream("POST", "/v1/completions", json=body) as answer:
                        return "data: [DONE]" in list(answer.iter_lines())
                except httpx.HTTPError:
                    return False

        with ThreadPoolExecutor(3) as pool:
            streams = [pool.submit(stream, seed) for seed in range(1, 4)]
            wait_until(lambda: server.engine()["running"] == 3, 60.0, "all streams run")
            gateway.kill()
            killed = time.monotonic()
            assert not any(future.result(60.0) for future in streams), "a stream does not outlive its gateway"

        def back() -> bool:
            try:
                with server.client(5.0) as client:
                    return client.get("/ready").status_code == 200
            except httpx.HTTPError:
                return False

        wait_until(back, BACK_WITHIN_S, "another gateway serves", interval_s=0.5)
        (other,) = server.processes_of("gateway")
        assert other.pid != gateway.pid
        print(f"another gateway serves after {time.monotonic() - killed:.1f} s")
        wait_until(server.idle, 60.0, "nothing runs for those that are gone", interval_s=0.5)
        assert server.processes_of(f"target-{MODEL}") == [target], "nothing else was restarted"
        assert server.complete(**fields(0))["choices"][0]["text"] == expected
