"""The router decides, can be pinned, and its loss in mid-stream costs nothing: no request, no token."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.chaos.streams import TWO_WORKERS, Streams, undisturbed
from tests.integration.ray_node import wait_until
from tests.integration.server import MODEL, Server, serve

pytestmark = [pytest.mark.serve, pytest.mark.slow]

BACK_WITHIN_S = 5.0


def pin(server: Server, name: str, **fields: Any) -> httpx.Response:
    with server.client(20.0) as client:
        return client.put(f"/admin/router/pins/{name}", json=fields)


def refused(answer: httpx.Response, status: int, param: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param


def test_the_router_decides_is_pinned_and_survives_its_death(tmp_path: Path) -> None:
    with serve(tmp_path, draft_pool=TWO_WORKERS, max_model_len=1024) as server:
        expected = undisturbed(server, range(4))
        wait_until(server.assignment, 30, "an assignment is made")
        first = server.assignment()
        assert first is not None
        assert (first["model"], first["pin"]) == (MODEL, None)
        assert first["reason"]
        workers = {w["worker"]: w for w in server.router()["workers"]}
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
        streams = Streams(server, expected)
        decided = server.router()["steps"]
        (victim,) = server.processes_of("RouterActor")
        victim.kill()
        killed = time.monotonic()
        wait_until(server.assignment, 60, "the router is back", interval_s=0.05)
        took = time.monotonic() - killed
        again = server.assignment()
        assert again is not None
        assert server.router()["steps"] < decided, "it is another router"
        assert streams.all_run(), "all of it happened under load"
        assert (again["exits"], again["cap"]) == ([4], 2)
        assert again["pin"] == {"worker": other, "exits": [4], "cap": 2}
        streams.join()
        assert streams.texts == expected
        assert took < BACK_WITHIN_S, f"assignments were back after {took:.1f} s"
        wait_until(lambda: server.router()["steps"] > 0, 15, "the new router decides")
        assert obeyed()

        with server.client(20.0) as client:
            assert client.delete(f"/admin/router/pins/{MODEL}").status_code == 200
            refused(client.delete(f"/admin/router/pins/{MODEL}"), 404, "target")
        wait_until(lambda: (server.assignment() or {"pin": 1})["pin"] is None, 5, "the pin is gone")
