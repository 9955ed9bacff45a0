"""The drafting stream end to end: a real gRPC server and real streams in this process."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from actors.draft_worker.batcher import DraftBatcher, Round
from actors.drafting.draft_ahead import AheadCounts
from actors.drafting.interface import (
    SCOPE_SHIFT,
    TREE,
    DraftQuery,
    ResetScope,
    SessionDraft,
    TargetIdentity,
)
from actors.drafting.prompt_lookup import PromptLookupDrafter
from actors.drafting.remote_link import LinkOptions
from actors.drafting.remote_source import RemoteDraftSource
from actors.drafting.selector import DrafterPool
from actors.drafting.session_ledger import RETRY_S
from tests.draft_rig import WAIT_S, SlowDrafter, Worker, drafted, model_free, session, until, wish


def test_rounds_commit_reject_and_learn(worker: Worker, sources) -> None:  # type: ignore[no-untyped-def]
    worker.start(model_free())
    source = sources(worker)
    assert tuple(source.drafters) == ("prompt_lookup", "token_recycling")
    assert source.wants_candidates == 8
    source.open(session(1, [1, 2, 3, 4, 1]))
    first = drafted(source, wish(1, 1, [2]))
    assert (first.drafter, first.token_ids, first.epoch) == ("prompt_lookup", (3, 4), 1)
    assert len(first.confidence) == 2
    # One accepted, then a correction that the matrix knows how to continue.
    second = drafted(source, wish(1, 2, [3, 50], candidates=((50, (60,)), (60, (70,)))))
    assert (second.drafter, second.token_ids) == ("token_recycling", (60, 70))
    assert drafted(source, wish(1, 3, [1, 2, 3])).token_ids == (50, 1), "the most recent match"
    assert drafted(source, wish(1, 4, drafter="nested")).error == "unsupported"
    source.reset("caches")
    assert drafted(source, wish(1, 5, [50], drafter="token_recycling")).token_ids == ()
    source.close_session(1)
    until(lambda: worker.sessions() == 0)
    stats = source.stats()
    assert (stats["connected"], stats["rounds"], stats["late_rounds"]) == (True, 5, 0)
    assert stats["address"] == worker.address
    assert isinstance(stats["round_trip_ms"], float)


@pytest.mark.parametrize("scopes", [("caches",), ("all",), ("caches", "all"), ("all", "caches")])
def test_a_worker_is_told_what_to_forget(
    worker: Worker,
    sources,
    scopes: tuple[ResetScope, ...],  # type: ignore[no-untyped-def]
) -> None:
    told: list[str] = []

    class Noting(SlowDrafter):
        def reset(self, scope: str = "all") -> None:
            told.append(scope)

    worker.start(DrafterPool([Noting()]))
    source = sources(worker)
    source.open(session(1, [5]))
    assert drafted(source, wish(1, 1)).token_ids
    assert told == []
    for scope in scopes:
        source.reset(scope)
    assert drafted(source, wish(1, 2, [5])).token_ids
    assert drafted(source, wish(1, 3, [5])).token_ids
    assert told == ["all" if "all" in scopes else "caches"], "once, and no less than was asked for"


def test_a_round_is_one_message_and_one_batch(worker: Worker, sources) -> None:  # type: ignore[no-untyped-def]
    drafter = SlowDrafter()
    worker.start(DrafterPool([drafter]))
    source = sources(worker)
    for sid in range(16):
        source.open(session(sid, [sid + 1]))
    source.submit([wish(sid, 1) for sid in range(16)])
    drafts = source.collect(dict.fromkeys(range(16), 1), WAIT_S)
    assert {sid: d.token_ids for sid, d in drafts.items()} == {s: (s + 1, s + 1) for s in range(16)}
    assert drafter.batches == [16]
    assert worker.server is not None
    assert worker.server.state.rounds == 2, "hello and one round"


def test_a_target_that_takes_trees_is_given_them_also_after_a_restart(worker: Worker, sources) -> None:  # type: ignore[no-untyped-def]
    worker.start(model_free())
    port = worker.port
    source = sources(worker)
    source.open(replace(session(1, [1, 2, 1, 3, 1]), trees=True))
    source.open(session(2, [1, 2, 1, 3, 1]))
    seen = ((1, (4, 5)),)
    tree = drafted(source, wish(1, 1, budget=4, candidates=seen))
    assert {3, 2, 4} <= {t for t, parent in zip(tree.token_ids, tree.parents, strict=True) if parent == -1}
    assert tree.drafter == TREE
    assert len(tree.sources) == len(tree.confidence) == 4
    assert drafted(source, wish(2, 1, budget=4)).parents == ()
    worker.stop()
    until(lambda: not source.connected)
    worker.start(model_free(), port)
    until(lambda: source.connected)
    assert drafted(source, wish(1, 2, [1], budget=4, candidates=seen)).parents
    chain = drafted(source, wish(1, 3, [1], budget=4, chain=True))
    assert chain.token_ids
    assert chain.parents == (), "who asks for a chain is given one"


def test_streams_with_the_same_session_ids_are_isolated(worker: Worker, sources) -> None:  # type: ignore[no-untyped-def]
    drafter = SlowDrafter()
    worker.start(DrafterPool([drafter]))
    one, two = sources(worker), sources(worker)
    one.open(session(1, [10]))
    two.open(session(1, [20]))
    assert drafted(one, wish(1, 1)).token_ids == (10, 10)
    assert drafted(two, wish(1, 1)).token_ids == (20, 20)
    assert drafted(one, wish(1, 2, [11])).token_ids == (11, 11)
    assert worker.sessions() == 2
    one.close()
    until(lambda: worker.sessions() == 1)
    assert drafted(two, wish(1, 2, [21])).token_ids == (21, 21)


def test_rounds_of_several_targets_are_one_batch(worker: Worker, sources) -> None:  # type: ignore[no-untyped-def]
    drafter = SlowDrafter()
    worker.start(DrafterPool([drafter]))
    targets = [sources(worker) for _ in range(4)]
    for target in targets:
        target.open(session(1, [10]))
    drafter.gate.clear()
    targets[0].submit([wish(1, 1)])
    assert drafter.entered.wait(WAIT_S)
    for target in targets[1:]:
        target.submit([wish(1, 1)])
    until(lambda: worker.server is not None and worker.server.state.queued_rounds == 3)
    drafter.gate.set()
    for target in targets:
        assert target.collect({1: 1}, WAIT_S)[1].token_ids == (10, 10)
    assert drafter.batches == [1, 3]


def test_late_drafts_cost_their_round_only(worker: Worker, sources) -> None:  # type: ignore[no-untyped-def]
    drafter = SlowDrafter()
    worker.start(DrafterPool([drafter]))
    source = sources(worker)
    source.open(session(1, [10]))
    drafted(source, wish(1, 1))
    drafter.delay_s = 0.5
    source.submit([wish(1, 2, [11])])
    started = time.monotonic()
    assert source.collect({1: 2}, 0.05) == {}
    assert time.monotonic() - started < 0.3
    assert source.connected
    drafter.delay_s = 0.0
    source.submit([wish(1, 3, [12])])
    draft = source.collect({1: 3}, WAIT_S).get(1)
    # The worker may have dropped the round, whose deadline passed while it was busy; never an old draft.
    assert draft is None or draft.token_ids in ((), (12, 12))
    assert drafted(source, wish(1, 4, [13])).token_ids == (13, 13)
    assert source.stats()["late_rounds"] == 1


def test_worker_restart_is_survived(worker: Worker, sources) -> None:  # type: ignore[no-untyped-def]
    drafter = SlowDrafter()
    worker.start(DrafterPool([drafter]))
    port = worker.port
    source = sources(worker)
    source.open(session(1, [10]))
    drafted(source, wish(1, 1))
    incarnation = source.stats()["incarnation"]
    drafter.gate.clear()
    source.submit([wish(1, 2, [11])])
    stopper = threading.Thread(target=worker.stop)
    stopper.start()
    started = time.monotonic()
    assert source.collect({1: 2}, WAIT_S) == {}, "an ended stream is not waited for"
    assert time.monotonic() - started < WAIT_S / 2
    drafter.gate.set()
    stopper.join(WAIT_S)
    assert not source.connected
    source.submit([wish(1, 3, [12])])
    assert source.collect({1: 3}, 5.0) == {}
    fresh = SlowDrafter()
    worker.start(DrafterPool([fresh]), port)
    until(lambda: source.connected)
    assert drafted(source, wish(1, 4, [13])).token_ids == (13, 13)
    assert list(fresh.tokens.values()) == [[10, 11, 12, 13]]
    stats = source.stats()
    assert stats["reconnects"] == 1
    assert stats["incarnation"] != incarnation


def test_a_replaced_or_vanished_lease_ends_the_connection(worker: Worker) -> None:
    worker.start(model_free())
    leases = [{"id": "a", "incarnation": "1", "address": worker.address, "load": 3.0}]
    source = RemoteDraftSource(
        lambda: leases,
        TargetIdentity("t", "m", 10),
        LinkOptions(backoff_s=0.02, lease_poll_s=0.05, vanished_polls=2),
    )
    try:
        until(lambda: source.connected)
        leases.append({"id": "b", "incarnation": "1", "address": worker.address, "load": 1.0})
        time.sleep(0.3)
        assert source.stats()["worker_id"] == "a", "a less loaded worker alone is no reason to leave"
        leases[0] = leases[0] | {"incarnation": "2"}
        until(lambda: source.stats()["worker_id"] == "b")
        leases.clear()
        until(lambda: not source.connected)
        leases.append({"id": "c", "address": worker.address})
        until(lambda: source.stats()["worker_id"] == "c")
    finally:
        source.close()


def test_a_silent_peer_is_noticed() -> None:
    """A peer that accepts connections and says nothing never counts as connected."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        source = RemoteDraftSource(
            lambda: [{"id": "x", "address": address}],
            TargetIdentity("t", "m", 10),
            LinkOptions(connect_timeout_s=0.3, keepalive_s=0.2),
        )
        try:
            source.open(session(1, [1]))
            source.submit([wish(1, 1)])
            started = time.monotonic()
            assert source.collect({1: 1}, 5.0) == {}
            assert time.monotonic() - started < 1.0
            assert not source.connected
        finally:
            started = time.monotonic()
            source.close()
            assert time.monotonic() - started < 6.0


def test_a_worker_that_stops_answering_is_given_up(worker: Worker, sources) -> None:  # type: ignore[no-untyped-def]
    drafter = SlowDrafter()
    worker.start(DrafterPool([drafter]))
    source = sources(worker, stuck_s=0.3)
    source.open(session(1, [1]))
    drafter.gate.clear()
    source.submit([wish(1, 1)])
    assert source.collect({1: 1}, WAIT_S) == {}
    drafter.gate.set()
    until(lambda: source.connected)
    assert drafted(source, wish(1, 2, [2])).token_ids == (2, 2)
    assert source.stats()["reconnects"] >= 1


def test_a_full_send_queue_drops_drafts_and_reconnects(worker: Worker, sources) -> None:  # type: ignore[no-untyped-def]
    drafter = SlowDrafter()
    worker.start(DrafterPool([drafter]))
    source = sources(worker, send_queue=4)
    source.open(session(1, [1]))
    drafter.gate.clear()
    started = time.monotonic()
    epoch = 0
    while not source.stats()["dropped_rounds"]:
        epoch += 1
        # Big messages: flow control holds them back once the worker no longer reads.
        source.submit([wish(1, epoch, [7] * 50_000)])
        assert time.monotonic() - started < WAIT_S
    drafter.gate.set()
    until(lambda: source.connected)
    assert drafted(source, wish(1, epoch + 1, [9])).token_ids == (9, 9)
    (tokens,) = drafter.tokens.values()
    assert len(tokens) == 1 + 50_000 * epoch + 1


def test_capacity_is_an_error_of_the_session(worker: Worker, sources) -> None:  # type: ignore[no-untyped-def]
    worker.start(DrafterPool([PromptLookupDrafter()], max_sessions=1))
    source = sources(worker)
    for sid in (1, 2):
        source.open(session(sid, [1, 2, 3, 1, 2]))
    source.submit([wish(1, 1), wish(2, 1)])
    drafts = source.collect({1: 1, 2: 1}, WAIT_S)
    assert drafts[1].token_ids == (3, 1)
    assert drafts[2].error == "capacity"
    source.submit([wish(2, 2)])
    assert source.collect({2: 2}, WAIT_S) == {}, "not asked again at once"
    source.close_session(1)
    time.sleep(RETRY_S)
    assert drafted(source, wish(2, 3)).error == "unknown_session"
    assert drafted(source, wish(2, 4)).token_ids == (3, 1)


def test_the_round_queue_is_bounded() -> None:
    drafter = SlowDrafter()
    batcher = DraftBatcher(DrafterPool([drafter]), max_queued=2)
    stream = batcher.attach()
    replies: dict[int, list[SessionDraft]] = {}

    def round_(n: int, **fields: object) -> Round:
        return Round(stream, lambda drafts: replies.update({n: drafts}), **fields)  # type: ignore[arg-type]

    batcher.start()
    try:
        drafter.gate.clear()
        batcher.submit(round_(0, opens=(session(1, [5]),), updates=(wish(1, 1),)))
        until(lambda: batcher.state().queued_rounds == 0)
        batcher.submit(round_(1, updates=(wish(1, 2, [6]),)))
        batcher.submit(round_(2, updates=(wish(1, 3, [7]),)))
        batcher.submit(round_(3, updates=(wish(1, 4, [8]),), closes=(1,)))
        assert [d.error for d in replies[3]] == ["capacity"]
        drafter.gate.set()
        until(lambda: len(replies) == 4)
        assert replies[0][0].token_ids == (5, 5)
        # Two rounds of one session waited: only the last is worth drafting for; its close came first though.
        assert [d.error for d in (*replies[1], *replies[2])] == ["unknown_session"] * 2
        until(lambda: batcher.state().sessions == 0)
    finally:
        drafter.gate.set()
        batcher.stop()
    batcher.submit(round_(9, updates=(wish(1, 1),)))
    assert replies[9][0].error == "capacity"


def test_superseded_and_expired_wishes_are_not_drafted() -> None:
    drafter = SlowDrafter()
    batcher = DraftBatcher(DrafterPool([drafter]))
    stream = batcher.attach()
    replies: dict[int, list[SessionDraft]] = {}

    def put(n: int, **fields: object) -> None:
        batcher.submit(Round(stream, lambda drafts: replies.update({n: drafts}), **fields))  # type: ignore[arg-type]

    put(0, opens=(session(1, [5]), session(2, [6])), updates=(wish(1, 1),))
    put(1, updates=(wish(1, 2, [7]),))
    put(2, updates=(wish(2, 1),), deadline=time.monotonic() - 1.0)
    batcher.start()
    try:
        until(lambda: len(replies) == 3)
    finally:
        batcher.stop()
    assert [replies[n][0].token_ids for n in range(3)] == [(), (7, 7), ()]
    assert drafter.batches == [1]
    assert replies[0][0].error is replies[2][0].error is None


def test_a_large_round_does_not_hold_up_those_of_others() -> None:
    drafter = SlowDrafter()
    batcher = DraftBatcher(DrafterPool([drafter]), max_batch_tokens=8)
    many, few = batcher.attach(), batcher.attach()
    answered: list[str] = []

    def put(stream: int, name: str, sessions: int, first: int = 0) -> None:
        opens = tuple(session((stream << SCOPE_SHIFT) + first + n, [5]) for n in range(sessions))
        updates = tuple(wish(o.session_id, 1) for o in opens)
        batcher.submit(Round(stream, lambda drafts: answered.append(name), opens=opens, updates=updates))

    put(many, "many", 20)
    put(few, "few", 1)
    put(few, "few again", 1, first=1)
    put(many, "many again", 1, first=20)
    batcher.start()
    try:
        until(lambda: len(answered) == 4)
    finally:
        batcher.stop()
    # The first to come is served, whatever its size; then those that have had less.
    assert answered == ["many", "few", "few again", "many again"]
    assert drafter.batches == [20, 3]


def test_a_prepared_draft_does_not_wait_for_those_that_have_to_be_computed() -> None:
    class Prepared(SlowDrafter):
        name = "nested"
        exits = (1,)
        ahead_counts = AheadCounts()

        def prepared(self, query: DraftQuery) -> bool:
            return query.session_id % 2 == 1

    drafter = Prepared()
    batcher = DraftBatcher(DrafterPool([drafter]))
    stream = batcher.attach()
    answered: list[int] = []

    def put(*ids: int) -> None:
        opens = tuple(session(sid, [5]) for sid in ids)
        updates = tuple(wish(sid, 1) for sid in ids)
        batcher.submit(Round(stream, lambda drafts: answered.append(ids[0]), opens=opens, updates=updates))

    put(2, 3)
    put(4)
    put(5, 7)
    batcher.submit(Round(stream, lambda drafts: answered.append(-1), closes=(3,)))
    batcher.start()
    try:
        until(lambda: len(answered) == 4)
    finally:
        batcher.stop()
    assert answered == [5, -1, 2, 4]
    assert drafter.batches == [2, 2], "a round is answered as a whole; of the session that was closed nothing"


def test_a_stream_that_ends_takes_its_rounds_along() -> None:
    batcher = DraftBatcher(DrafterPool([SlowDrafter()]))
    gone, stays = batcher.attach(), batcher.attach()
    answered: list[int] = []
    for stream in (gone, stays):
        opened = session(stream << SCOPE_SHIFT, [5])
        batcher.submit(
            Round(
                stream,
                lambda drafts, stream=stream: answered.append(stream),  # type: ignore[misc]
                opens=(opened,),
                updates=(wish(opened.session_id, 1),),
            )
        )
    batcher.detach(gone)
    batcher.start()
    try:
        until(lambda: answered == [stays])
        until(lambda: batcher.state().sessions == 1)
    finally:
        batcher.stop()
    assert answered == [stays]


_PROCESS = """
import asyncio
from actors.draft_worker.server import DraftServer
from actors.drafting.prompt_lookup import PromptLookupDrafter
from actors.drafting.selector import DrafterPool
async def main():
    server = DraftServer(DrafterPool([PromptLookupDrafter()]), "w", port_range=(0, 0))
    print(await server.start(), flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def test_a_frozen_worker_is_noticed_by_its_silence(sources) -> None:  # type: ignore[no-untyped-def]
    """The kernel of a stopped process goes on acknowledging; only keepalive pings tell."""
    process = subprocess.Popen([sys.executable, "-c", _PROCESS], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        source = sources(process.stdout.readline().strip())
        source.open(session(1, [1, 2, 3, 1, 2]))
        assert drafted(source, wish(1, 1)).token_ids == (3, 1)
        process.send_signal(signal.SIGSTOP)
        source.submit([wish(1, 2)])
        started = time.monotonic()
        assert source.collect({1: 2}, WAIT_S) == {}
        assert time.monotonic() - started < 4.0
        assert not source.connected
        process.send_signal(signal.SIGCONT)
        until(lambda: source.connected)
        assert drafted(source, wish(1, 3)).token_ids == (3, 1)
    finally:
        process.kill()
        process.wait(WAIT_S)
