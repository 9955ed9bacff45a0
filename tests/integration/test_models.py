"""Models come and go, fall asleep and wake while `s2d serve` runs."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml
from google.protobuf.empty_pb2 import Empty

from cluster.client import RetryPolicy, S2DClient, S2DError
from protos.s2d.v1 import generation_pb2_grpc
from tests.integration.ray_node import free_ports, wait_until
from tests.integration.server import Server, _ready, stop
from tests.toy_draft import toy_base

PROMPT = "the quick brown fox"
SCALING = {
    "min_replicas": 0, "max_replicas": 2, "target_ongoing_requests": 1, "upscale_delay_s": 0,
    "downscale_delay_s": 1, "look_back_period_s": 1,
}  # fmt: skip
FAST_METRICS = {
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
}
ENGINE = {"threads": 1, "kv_blocks": 256, "max_num_seqs": 4, "max_queued": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("toys")
    quick = {name: str(toy_base(root / name, seed=seed)) for seed, name in enumerate(("steady", "guest"))}
    return quick | {"slow": str(toy_base(root / "slow", layers=96))}


@contextmanager
def cluster(root: Path, models: list[dict[str, Any]], draft_pool: dict[str, Any]) -> Iterator[Server]:
    http_port, grpc_port = free_ports(2)
    gateway = {"http_port": http_port, "grpc_port": grpc_port, "admin_endpoints": True}
    content = {"models": models, "draft_pool": draft_pool, "gateway": gateway | {"cold_start_timeout_s": 30}}
    file, log = root / "cluster.yaml", root / "serve.log"
    file.write_text(yaml.safe_dump(content))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "s2d"), "serve", "-c", str(file)],
            stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **FAST_METRICS},
        )  # fmt: skip
    running = Server(f"http://127.0.0.1:{http_port}", f"127.0.0.1:{grpc_port}", process, log)
    try:
        wait_until(lambda: _ready(running), 120.0, "the server is ready", interval_s=0.5)
        yield running
    finally:
        stop(running)


@pytest.fixture(scope="module")
def server(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One model of the configuration, no draft pool; the others are loaded."""
    root = tmp_path_factory.mktemp("server")
    with cluster(root, [model("steady", folders["steady"])], {"replicas": 0}) as running:
        yield running


def model(name: str, source: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "source": source, "dtype": "float32", "num_cpus": 0.2, "engine": ENGINE, **fields}


def ask(server: Server, name: str, tokens: int = 8, timeout_s: float = 60.0) -> httpx.Response:
    body = {"model": name, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    with server.client(timeout_s) as client:
        return client.post("/v1/completions", json=body)


def listed(server: Server) -> dict[str, dict[str, Any]]:
    with server.client(10.0) as client:
        return {m["id"]: m for m in client.get("/v1/models").json()["data"]}


def state(server: Server, name: str) -> str | None:
    found = listed(server).get(name)
    return None if found is None else str(found["state"])


def replicas(server: Server, name: str) -> int:
    found = next(m for m in server.state()["models"] if m["name"] == name)
    return len(found["replicas"])


def s2d(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).parent / "s2d"), *arguments, "--url", server.url],
        capture_output=True, text=True, timeout=120.0, env={**os.environ, "COLUMNS": "200"}, check=False,
    )  # fmt: skip


def load(server: Server, description: dict[str, Any]) -> httpx.Response:
    with server.client(20.0) as client:
        return client.post("/admin/models", json=description)


def unload(server: Server, name: str) -> None:
    with server.client(20.0) as client:
        assert client.delete(f"/admin/models/{name}").status_code == 202
    assert ask(server, name).status_code == 404


def engine(server: Server, name: str) -> dict[str, int]:
    found = next(m for m in server.state()["models"] if m["name"] == name)
    return dict(found["replicas"][0]["engine"])


class Streaming:
    """Completions of one model, one after the other, until stopped."""

    def __init__(self, server: Server, name: str) -> None:
        self._server, self._name = server, name
        self._stop = threading.Event()
        self.texts: list[str] = []
        self.problems: list[str] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            answer = ask(self._server, self._name, 200)
            if answer.status_code == 200:
                self.texts.append(answer.json()["choices"][0]["text"])
            else:
                self.problems.append(answer.text)

    def __enter__(self) -> Streaming:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(90.0)


def test_loading_and_unloading_disturbs_nobody(
    server: Server, folders: dict[str, str], tmp_path: Path
) -> None:
    before = server.processes()
    file = tmp_path / "guest.yaml"
    file.write_text(yaml.safe_dump(model("org/guest", folders["guest"])))
    assert ask(server, "org/guest").status_code == 404
    with Streaming(server, "steady") as streaming:
        loaded = s2d(server, "models", "load", "-c", str(file))
        assert loaded.returncode == 0, loaded.stdout + loaded.stderr
        assert "org/guest is ready" in loaded.stdout
        guest = ask(server, "org/guest", 24).json()
        assert guest["model"] == "org/guest"
        assert guest["choices"][0]["text"] != ask(server, "steady", 24).json()["choices"][0]["text"]
        assert "org/guest" in s2d(server, "models").stdout
        with grpc.insecure_channel(server.grpc_address) as channel:  # a client that knows of no Ray Serve
            stub = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
            served = stub.ListModels(Empty(), timeout=10.0)
        assert {m.id for m in served.models} == {"steady", "org/guest"}
        again = load(server, model("org/guest", folders["guest"]))
        assert (again.status_code, again.json()["error"]["code"]) == (409, "model_exists")
        # What runs ends, what comes is refused.
        with Streaming(server, "org/guest") as running:
            wait_until(lambda: bool(running.texts), 30.0, "the guest answers")
            assert "is being unloaded" in s2d(server, "models", "unload", "org/guest").stdout
            wait_until(lambda: bool(running.problems), 10.0, "the guest is gone")
        assert all("model_not_found" in problem for problem in running.problems)
        assert len(set(running.texts)) == 1
        assert state(server, "org/guest") is None
    assert not streaming.problems
    assert len(set(streaming.texts)) == 1
    # The gateway and the worker of the other model are the processes that they were.
    assert all(process.is_running() for process in before if "s2d:" not in process.name())
    refused = s2d(server, "models", "unload", "steady")
    assert refused.returncode == 1
    assert "is part of the cluster's configuration" in refused.stderr


def test_what_cannot_be_loaded_says_why(server: Server) -> None:
    with server.client(20.0) as client:
        answer = client.post("/admin/models", json={"name": "x", "source": "y", "dytpe": "int8"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "dytpe")
    assert load(server, model("broken", "/no/such/folder")).status_code == 202
    wait_until(lambda: state(server, "broken") == "failed", 90.0, "loading has failed", interval_s=0.5)
    answer = ask(server, "broken")
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert ask(server, "steady").status_code == 200
    unload(server, "broken")


def whole(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["choices"][0])


@contextmanager
def slow_model(server: Server, folders: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Loaded; a request whose answer takes it seconds."""
    assert load(server, model("slow", folders["slow"])).status_code == 202
    wait_until(lambda: state(server, "slow") == "ready", 60.0, "the model is ready", interval_s=0.5)
    yield {"model": "slow", "prompt": PROMPT, "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    unload(server, "slow")


async def test_a_full_queue_says_when_to_come_back(server: Server, folders: dict[str, str]) -> None:
    """Twelve at once where four run and four wait: four are refused. Over gRPC another."""
    with slow_model(server, folders) as body:
        await twelve_at_once(server, body)


async def twelve_at_once(server: Server, body: dict[str, Any]) -> None:
    places = ENGINE["max_num_seqs"] + ENGINE["max_queued"]
    async with httpx.AsyncClient(base_url=server.url, timeout=300.0) as client:
        asked = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(places + 4)]
        done: set[asyncio.Task[httpx.Response]] = set()
        admitted = set(asked)
        while len(done) < 4:
            finished, admitted = await asyncio.wait(admitted, return_when=asyncio.FIRST_COMPLETED)
            done |= finished
        for task in done:
            answer = task.result()
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded"), answer.text
            assert int(answer.headers["retry-after"]) >= 1
        assert len(admitted) == places
        async with S2DClient(server.grpc_address, retry=RetryPolicy(attempts=1)) as grpc_client:
            with pytest.raises(S2DError) as refused:
                async for _ in grpc_client.generate("slow", PROMPT, max_tokens=1):
                    pass
        assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.value.retry_after_s is not None
        assert refused.value.retry_after_s >= 1
        assert len({whole(answer)["text"] for answer in await asyncio.gather(*admitted)}) == 1
    assert whole(ask(server, "slow"))["finish_reason"] == "length"


@pytest.mark.slow
def test_unloading_waits_for_prompts_that_have_not_begun(server: Server, folders: dict[str, str]) -> None:
    """More than a worker takes at once: those that wait for a place come after the model was unloaded."""
    prompts = {"prompt": [PROMPT] * 24, "max_tokens": 100}
    with ThreadPoolExecutor(1) as pool, server.client(300.0) as client:
        with slow_model(server, folders) as body:
            running = pool.submit(client.post, "/v1/completions", json=body | prompts)
            wait_until(lambda: engine(server, "slow")["running"] == 4, 30.0, "the list runs")
        assert load(server, model("slow", folders["slow"])).status_code == 409
        answer = running.result(300.0)
        assert whole(answer)["finish_reason"] == "length"
        assert len(answer.json()["choices"]) == 24
    wait_until(lambda: load(server, model("slow", folders["slow"])).status_code == 202, 30.0, "it is gone")
    unload(server, "slow")


@pytest.mark.slow
def test_a_model_sleeps_wakes_grows_and_sleeps_again(server: Server, folders: dict[str, str]) -> None:
    """Also after streams that their clients left."""
    assert load(server, model("sleepy", folders["guest"], autoscaling=SCALING)).status_code == 202
    wait_until(lambda: state(server, "sleepy") == "asleep", 30.0, "it sleeps", interval_s=0.2)
    with server.client(10.0) as client:
        assert client.get("/ready").status_code == 200
        assert "steady" in client.get("/metrics").text
    assert state(server, "sleepy") == "asleep", "looking at a model must not wake it"
    woken = ask(server, "sleepy")
    assert woken.status_code == 200, woken.text
    assert woken.json()["choices"][0]["text"] == ask(server, "sleepy").json()["choices"][0]["text"]
    with Streaming(server, "sleepy"), Streaming(server, "sleepy"), Streaming(server, "sleepy"):
        wait_until(lambda: replicas(server, "sleepy") == 2, 60.0, "it grows", interval_s=0.5)
    for _ in range(6):
        body = {"model": "sleepy", "prompt": PROMPT, "max_tokens": 400, "stream": True, "ignore_eos": True}
        with server.client() as client, client.stream("POST", "/v1/completions", json=body) as stream:
            next(stream.iter_lines())
    wait_until(lambda: state(server, "sleepy") == "asleep", 90.0, "it sleeps again", interval_s=0.5)
    assert ask(server, "sleepy").status_code == 200
    unload(server, "sleepy")


@pytest.mark.slow
async def test_a_model_that_cannot_wake_is_refused_in_time(server: Server, folders: dict[str, str]) -> None:
    """No node has so many CPUs: 503 after the wait that is configured, and when to come back."""
    description = model("huge", folders["guest"], num_cpus=1000, autoscaling=SCALING)
    assert load(server, description).status_code == 202
    wait_until(lambda: state(server, "huge") == "asleep", 30.0, "it sleeps", interval_s=0.2)
    started = time.monotonic()
    answer = ask(server, "huge")
    assert 25.0 < time.monotonic() - started < 45.0
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert int(answer.headers["retry-after"]) >= 1
    async with S2DClient(server.grpc_address, retry=RetryPolicy(attempts=1)) as client:
        with pytest.raises(S2DError) as refused:
            async for _ in client.generate("huge", PROMPT, max_tokens=4):
                pass
    assert refused.value.code is grpc.StatusCode.UNAVAILABLE
    unload(server, "huge")


@pytest.mark.slow
def test_the_draft_pool_grows_with_its_work(folders: dict[str, str], tmp_path: Path) -> None:
    (draft_port,) = free_ports(1)
    scaling = {
        "max_replicas": 2, "target_utilisation": 0.001, "upscale_delay_s": 0, "downscale_delay_s": 1,
        "look_back_period_s": 1,
    }  # fmt: skip
    pool = {
        "autoscaling": scaling, "port_range": [draft_port, draft_port + 20], "local_drafting": False,
        "num_cpus": 0.2,
    }  # fmt: skip
    with cluster(tmp_path, [model("steady", folders["steady"])], pool) as running:

        def workers() -> int:
            return len(running.state()["draft_workers"])

        wait_until(lambda: workers() == 1, 30.0, "one worker drafts")
        with Streaming(running, "steady") as streaming:
            wait_until(lambda: workers() == 2, 60.0, "the pool grows", interval_s=0.5)
        wait_until(lambda: workers() == 1, 60.0, "the pool shrinks", interval_s=0.5)
        assert not streaming.problems
        assert ask(running, "steady").status_code == 200


@pytest.mark.slow
def test_a_configured_model_may_begin_asleep(folders: dict[str, str], tmp_path: Path) -> None:
    """The server is ready without it, and its first request brings it."""
    sleepy = model("sleepy", folders["guest"], autoscaling=SCALING)
    with cluster(tmp_path, [sleepy], {"replicas": 0}) as running:
        assert state(running, "sleepy") == "asleep"
        assert replicas(running, "sleepy") == 0
        assert ask(running, "sleepy").status_code == 200
        wait_until(lambda: state(running, "sleepy") == "ready", 20.0, "it is awake", interval_s=0.5)
        wait_until(lambda: state(running, "sleepy") == "asleep", 60.0, "it sleeps again", interval_s=0.5)
