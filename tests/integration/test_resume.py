"""Target replicas die under load, with SIGKILL: every stream ends with the text that it would have had."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import psutil
import pytest

from tests.integration.ray_node import wait_until
from tests.integration.server import MODEL, Server, serve

pytestmark = pytest.mark.slow

RESTART_TIMEOUT_S = 120.0
ASKED: list[dict[str, Any]] = [
    {"prompt": "The three laws of motion are", "temperature": 0.0},
    {"prompt": "Once upon a time there was a fox who", "temperature": 0.9, "seed": 5, "n": 2},
    {"prompt": "A list of colours: red, green,", "temperature": 0.0, "logprobs": 2, "echo": True},
    {"prompt": "Water boils at", "temperature": 1.0, "seed": 11, "stop": ["zzzz"]},
    {"prompt": "def fibonacci(n):", "temperature": 0.0, "speculation": {"enabled": False}},
    {"prompt": "My favourite food is", "temperature": 0.7, "seed": 3},
]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("resume")
    engine = {"threads": 1, "kv_blocks": 256}
    with serve(folder, max_model_len=512, replicas=2, num_cpus=0.4, engine=engine) as running:
        yield running


def targets(server: Server) -> list[psutil.Process]:
    return server.processes_of(f"target-{MODEL}")


def texts(choices: list[dict[str, Any]], n: int) -> list[str]:
    return ["".join(c["text"] for c in choices if c["index"] == i) for i in range(n)]


def stream(server: Server, fields: dict[str, Any], begun: Barrier) -> tuple[list[str], dict[str, Any]]:
    """Texts by choice and the usage; waits at the barrier after its first event."""
    body = {"model": MODEL, "max_tokens": 150, "stream": True, "stream_options": {"include_usage": True}}
    choices: list[dict[str, Any]] = []
    usage: dict[str, Any] = {}
    with (
        server.client(300.0) as client,
        client.stream("POST", "/v1/completions", json=body | fields) as answer,
    ):
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            usage = event.get("usage") or usage
            if event["choices"] and not choices:
                begun.wait(120.0)
            choices += event["choices"]
    return texts(choices, fields.get("n", 1)), usage


def interrupted(server: Server, asked: list[dict[str, Any]], kill: int) -> list[tuple[list[str], Any]]:
    """All requests at once; once each has begun, `kill` replicas are ended."""
    begun = Barrier(len(asked) + 1)
    with ThreadPoolExecutor(len(asked)) as pool:
        running = [pool.submit(stream, server, fields, begun) for fields in asked]
        begun.wait(120.0)
        for process in targets(server)[:kill]:
            process.kill()
        return [future.result(300.0) for future in running]


def resumed(server: Server) -> float:
    with server.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return sum(float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith("ray_s2d_requests_resumed_total"))


def test_streams_outlive_their_replica(two: Server) -> None:
    whole = [two.complete(max_tokens=150, **fields) for fields in ASKED]
    assert len(targets(two)) == 2
    for fields, expected, (got, usage) in zip(ASKED, whole, interrupted(two, ASKED, kill=1), strict=True):
        assert got == texts(expected["choices"], fields.get("n", 1)), fields
        for key in ("prompt_tokens", "completion_tokens"):
            assert usage[key] == expected["usage"][key], fields
    wait_until(lambda: resumed(two) >= 1, 60.0, "the counter shows a resumed request", 1.0)
    wait_until(lambda: len(targets(two)) == 2, RESTART_TIMEOUT_S, "the replica is back", 1.0)


def test_a_stream_waits_for_a_restart_when_no_replica_is_left(two: Server) -> None:
    whole = two.complete(max_tokens=150, **ASKED[1])
    ((got, _),) = interrupted(two, ASKED[1:2], kill=2)
    assert got == texts(whole["choices"], 2)
