"""The router, one of two draft workers and one of two target replicas die together, under load: no request is
lost, no text changes, and what is left drafts again within seconds."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from tests.chaos.streams import TWO_WORKERS, Streams, undisturbed
from tests.integration.ray_node import wait_until
from tests.integration.server import MODEL, Server, serve

pytestmark = [pytest.mark.serve, pytest.mark.slow]

RECOVERED_WITHIN_S = 5.0
REPLACED_WITHIN_S = 120.0


def worker_process(server: Server, worker_id: str) -> psutil.Process:
    """The process that listens on a draft worker's address."""
    (address,) = [w["address"] for w in server.state()["draft_workers"] if w["id"] == worker_id]
    port = int(address.rsplit(":", 1)[1])
    (found,) = [
        process
        for process in server.processes_of("draft-pool")
        if any(c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in process.net_connections())
    ]
    return found


def test_router_draft_worker_and_target_replica_die_together(tmp_path: Path) -> None:
    two_targets = {"replicas": 2, "num_cpus": 0.4, "engine": {"threads": 1, "kv_blocks": 256}}
    with serve(tmp_path, draft_pool=TWO_WORKERS, max_model_len=1024, **two_targets) as server:
        expected = undisturbed(server, range(6))
        wait_until(lambda: len(server.router()["workers"]) == 2, 30, "both workers are known")
        wait_until(server.assignment, 30, "an assignment is made")
        time.sleep(2.5)  # the state is saved a second after it changed

        streams = Streams(server, expected)
        before = server.assignment()
        assert before is not None
        lost = before["worker"]
        (router,) = server.processes_of("RouterActor")
        victims = [router, worker_process(server, lost), server.processes_of(f"target-{MODEL}")[0]]
        for victim in victims:
            victim.kill()
        killed = time.monotonic()

        def recovered() -> bool:
            now = server.assignment()
            return now is not None and now["worker"] not in (None, lost)

        wait_until(recovered, 60, "the other draft worker is assigned", interval_s=0.05)
        took = time.monotonic() - killed
        assert streams.all_run(), "all of it happened under load"
        streams.join()
        assert streams.texts == expected
        print(f"assigned to a living worker after {took:.1f} s")
        assert took < RECOVERED_WITHIN_S, f"the target was assigned to a living worker after {took:.1f} s"

        def replaced() -> bool:
            targets, workers = server.processes_of(f"target-{MODEL}"), server.router()["workers"]
            return len(targets) == 2 and len(workers) == 2 and lost not in {w["worker"] for w in workers}

        wait_until(replaced, REPLACED_WITHIN_S, "replica and worker are replaced", interval_s=1.0)
