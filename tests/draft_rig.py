"""A draft worker's server, and what is asked of it, for tests."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from actors.draft_worker.server import DraftServer
from actors.drafting.interface import DraftQuery, SessionDraft, SessionOpen, SessionUpdate
from actors.drafting.prompt_lookup import PromptLookupDrafter
from actors.drafting.remote_source import RemoteDraftSource
from actors.drafting.selector import DrafterPool
from actors.drafting.token_recycling import TokenRecyclingDrafter
from actors.sampling.params import DraftSampling

SAMPLING = DraftSampling(key=2**64 - 5, temperature=0.7, top_k=3, top_p=0.9, min_p=0.1)
WAIT_S = 10.0


def session(sid: int, tokens: Sequence[int], epoch: int = 0) -> SessionOpen:
    return SessionOpen(sid, tuple(tokens), len(tokens), SAMPLING, epoch)


def wish(sid: int, epoch: int, new: Sequence[int] = (), budget: int = 2, **fields: object) -> SessionUpdate:
    return replace(SessionUpdate(sid, epoch, tuple(new), budget), **fields)  # type: ignore[arg-type]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


class SlowDrafter:
    """Proposes the last token again, after `delay_s`; remembers its sessions and what it was asked for."""

    name = "slow"
    learns = False

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.tokens: dict[int, list[int]] = {}
        self.batches: list[int] = []
        self.queries: list[DraftQuery] = []

    def open(self, session: SessionOpen) -> None:
        self.tokens[session.session_id] = list(session.token_ids)

    def commit(self, session_id: int, new_tokens: Sequence[int], candidates: object = ()) -> None:
        self.tokens[session_id].extend(new_tokens)

    def propose(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
        self.entered.set()
        self.gate.wait(WAIT_S)
        time.sleep(self.delay_s)
        self.batches.append(len(queries))
        self.queries += queries
        return [
            SessionDraft(q.session_id, q.epoch, (self.tokens[q.session_id][-1],) * q.budget, drafter="slow")
            for q in queries
        ]

    def close(self, session_id: int) -> None:
        del self.tokens[session_id]

    def reset(self, scope: str = "all") -> None: ...


class Worker:
    """A draft server on a loop of its own thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.server: DraftServer | None = None
        self.address = ""

    def start(self, pool: DrafterPool, port: int = 0, **options: object) -> str:
        return self.run(DraftServer(pool, "worker", port_range=(port, port), **options))  # type: ignore[arg-type]

    def run(self, server: DraftServer) -> str:
        async def go() -> None:
            self.server = server
            self.address = await server.start()

        asyncio.run_coroutine_threadsafe(go(), self._loop).result(WAIT_S)
        return self.address

    def stop(self, grace: float = 0.0) -> None:
        if self.server is not None:
            asyncio.run_coroutine_threadsafe(self.server.stop(grace), self._loop).result(WAIT_S)
            self.server = None

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def lease(self) -> list[dict[str, object]]:
        assert self.server is not None
        return [{"id": "worker", "incarnation": self.server.incarnation, "address": self.address}]

    def sessions(self) -> int:
        assert self.server is not None
        return self.server.state.sessions


def model_free() -> DrafterPool:
    return DrafterPool([PromptLookupDrafter(), TokenRecyclingDrafter()], max_sessions=8)


def drafted(source: RemoteDraftSource, update: SessionUpdate, timeout_s: float = WAIT_S) -> SessionDraft:
    source.submit([update])
    return source.collect({update.session_id: update.epoch}, timeout_s)[update.session_id]
