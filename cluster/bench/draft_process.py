"""A draft worker in a process of its own, without Ray: for measurements of one engine."""

from __future__ import annotations

import asyncio
import multiprocessing as mp
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from cluster.config import DraftPoolConfig

_START_TIMEOUT_S = 180.0


def _serve(config: DraftPoolConfig, pipe: Connection) -> None:
    from actors.draft_worker.server import build_draft_server

    async def run() -> None:
        server = build_draft_server(config, "bench")
        pipe.send((await server.start(), server.incarnation))
        await asyncio.to_thread(pipe.recv)
        await server.stop(0.2)

    asyncio.run(run())


@contextmanager
def draft_process(config: DraftPoolConfig) -> Iterator[list[dict[str, object]]]:
    """Leases of a running draft worker, which ends with the context. Raises TimeoutError."""
    os.environ["OMP_NUM_THREADS"] = str(config.compute_threads)
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    ours, theirs = mp.get_context("spawn").Pipe()
    process = mp.get_context("spawn").Process(target=_serve, args=(config, theirs), daemon=True)
    process.start()
    try:
        if not ours.poll(_START_TIMEOUT_S):
            raise TimeoutError("the draft worker did not start")
        address, incarnation = ours.recv()
        yield [{"id": "bench", "incarnation": incarnation, "address": address, "exits": (), "load": 0.0}]
        ours.send("stop")
        process.join(10.0)
    finally:
        if process.is_alive():
            process.kill()
