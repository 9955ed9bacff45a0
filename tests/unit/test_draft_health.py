"""A drafting thread that hangs, ends or keeps failing is noticed; what goes wrong with one session is not the
others' business."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar, cast

import pytest

from actors.draft_worker.batcher import DraftBatcher, Round
from actors.drafting.interface import DraftQuery, NestedWish, SessionDraft, SessionUpdate
from actors.drafting.selector import FAILING_AFTER, DrafterPool
from actors.turn_watch import MAX_CONSECUTIVE_FAILURES
from cluster.deployments.draft import DraftPool
from tests.draft_rig import WAIT_S, SlowDrafter, Worker, drafted, session, until, wish

POISON = 66


class Replies:
    """Rounds of one stream and the drafts that came back, in order."""

    def __init__(self, batcher: DraftBatcher) -> None:
        self._batcher = batcher
        self._stream = batcher.attach()
        self.drafts: list[SessionDraft] = []
        self.shadows: list[SessionDraft] = []

    def put(self, *updates: SessionUpdate, **fields: object) -> None:
        made = Round(self._stream, self.drafts.extend, updates=updates, shadow_reply=self.shadows.extend)
        self._batcher.submit(replace(made, **fields))  # type: ignore[arg-type]

    def ask(self, update: SessionUpdate, **fields: object) -> SessionDraft:
        before = len(self.drafts)
        self.put(update, **fields)
        until(lambda: len(self.drafts) > before)
        return self.drafts[-1]


def check_health(batcher: DraftBatcher) -> None:
    """As Serve asks the replica."""
    task = SimpleNamespace(done=lambda: False)
    server = SimpleNamespace(state=batcher.state())
    replica = SimpleNamespace(_server=server, _renewer=task, _reporter=None)
    asyncio.run(DraftPool.check_health(cast(DraftPool, replica)))


def test_a_pass_that_hangs_and_a_thread_that_ends_fail_the_health_check() -> None:
    drafter = SlowDrafter()
    batcher = DraftBatcher(DrafterPool([drafter]), turn_limit_s=0.2)
    replies = Replies(batcher)
    batcher.start()
    try:
        replies.ask(wish(1, 1), opens=(session(1, [5]),))
        check_health(batcher)
        drafter.gate.clear()
        replies.put(wish(1, 2, [6]))
        until(lambda: not batcher.state().healthy)
        with pytest.raises(RuntimeError, match="dead or hangs"):
            check_health(batcher)
        drafter.gate.set()
        until(lambda: batcher.state().healthy)
        time.sleep(0.3)
        check_health(batcher)  # idling is no hanging
    finally:
        drafter.gate.set()
        batcher.stop()
    with pytest.raises(RuntimeError, match="dead or hangs"):
        check_health(batcher)


def test_batches_that_keep_failing_make_it_unhealthy() -> None:
    class Failing(DrafterPool):
        fails = True

        def propose(self, updates: Sequence[SessionUpdate], together: int = 0) -> list[SessionDraft]:
            if self.fails:
                raise RuntimeError("scripted failure")
            return super().propose(updates, together)

    pool = Failing([SlowDrafter()])
    batcher = DraftBatcher(pool)
    replies = Replies(batcher)
    batcher.start()
    try:
        replies.put(opens=(session(1, [5]),))
        for epoch in range(1, MAX_CONSECUTIVE_FAILURES + 1):
            until(lambda: batcher.state().healthy)
            assert replies.ask(wish(1, epoch)).error == "internal"
        until(lambda: not batcher.state().healthy)
        pool.fails = False
        assert replies.ask(wish(1, MAX_CONSECUTIVE_FAILURES + 1)).token_ids == (5, 5)
        assert batcher.state().healthy, "a good batch heals it"
    finally:
        batcher.stop()


def test_a_drafter_that_fails_every_session_fails_the_health_check() -> None:
    class Failing(SlowDrafter):
        name = "failing"
        broken: ClassVar[set[int]] = {1, 2, 3}

        def propose(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
            if any(query.session_id in self.broken for query in queries):
                raise RuntimeError("scripted failure")
            return super().propose(queries)

    pool = DrafterPool([Failing(), SlowDrafter()])
    batcher = DraftBatcher(pool)
    replies = Replies(batcher)
    batcher.start()
    try:
        for again in range(FAILING_AFTER + 1):  # one session that it cannot draft for is no reason
            replies.ask(wish(1, 1), opens=(session(1, [5]),))
            assert pool.failing == (), again
        replies.ask(wish(2, 1), opens=(session(2, [5]),))
        replies.ask(wish(4, 1), opens=(session(4, [5]),))
        for sid in (1, 2):
            replies.ask(wish(sid, 1), opens=(session(sid, [5]),))
            check_health(batcher)
        assert replies.ask(wish(3, 1), opens=(session(3, [5]),)).drafter != "failing"
        with pytest.raises(RuntimeError, match="keep failing: failing"):
            check_health(batcher)
        Failing.broken = set()
        replies.ask(wish(3, 1), opens=(session(3, [5]),))
        check_health(batcher)
    finally:
        batcher.stop()


def test_a_draft_that_cannot_be_sent_is_an_error_of_its_session(worker: Worker, sources) -> None:  # type: ignore[no-untyped-def]
    class Poisoned(SlowDrafter):
        def propose(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
            made = super().propose(queries)
            return [replace(d, token_ids=(-1,)) if POISON in d.token_ids else d for d in made]

    worker.start(DrafterPool([Poisoned()]))
    source = sources(worker)
    source.open(session(1, [POISON]))
    source.open(session(2, [7]))
    source.submit([wish(1, 1), wish(2, 1)])
    drafts = source.collect({1: 1, 2: 1}, WAIT_S)
    assert drafts[1].error == "internal"
    assert drafts[2].token_ids == (7, 7)
    assert drafted(source, wish(2, 2, [8])).token_ids == (8, 8)
    assert worker.server is not None
    assert worker.server.state.healthy


def test_a_reply_or_a_draft_for_scoring_that_fails_leaves_the_thread_alive() -> None:
    class Failing(DrafterPool):
        def shadow(self, update: SessionUpdate) -> SessionDraft | None:
            raise RuntimeError("scripted failure")

    def refuse(drafts: list[SessionDraft]) -> None:
        raise RuntimeError("scripted failure")

    batcher = DraftBatcher(Failing([SlowDrafter()]))
    replies = Replies(batcher)
    batcher.start()
    try:
        scored = NestedWish(shadow_exit=1, shadow_length=2)
        replies.put(wish(1, 1, nested=scored), opens=(session(1, [5]),), reply=refuse)
        until(lambda: len(replies.shadows) == 1)
        assert replies.shadows[0].error == "internal"
        replies.put(wish(1, 2, nested=scored), shadow_reply=refuse)
        assert replies.ask(wish(1, 3, [6])).token_ids == (6, 6)
        assert batcher.state().healthy
    finally:
        batcher.stop()
