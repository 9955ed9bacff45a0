"""The drafting stream end to end: a real gRPC server and real streams in this process."""

from __future__ import annotations

import asyncio
import datetime
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import get_args

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tokenizers import Tokenizer, decoders, models

from actors.draft_worker.batcher import DraftBatcher, Round
from actors.draft_worker.server import DraftServer, build_draft_server
from actors.draft_worker.vocabularies import DraftVocabulary
from actors.drafting import codec
from actors.drafting.interface import (
    TREE,
    DraftErrorCode,
    DraftQuery,
    DraftSampling,
    NestedWish,
    SessionDraft,
    SessionOpen,
    SessionUpdate,
    TargetIdentity,
)
from actors.drafting.prompt_lookup import PromptLookupDrafter
from actors.drafting.remote_link import LinkOptions
from actors.drafting.remote_source import RemoteDraftSource
from actors.drafting.selector import DrafterPool
from actors.drafting.session_ledger import RETRY_S, SessionLedger
from actors.drafting.token_recycling import TokenRecyclingDrafter
from actors.text.token_table import TokenTable
from actors.text.tokenizer import TextTokenizer
from actors.text.tokenizer_file import pack
from cluster.config import DraftPoolConfig
from protos.s2d.v1 import drafting_pb2 as pb
from protos.s2d.v1 import drafting_pb2_grpc as pb_grpc
from tests.exactness.harness import tiny_llama
from tests.toy_tokenizers import byte_fallback_folder, byte_level_folder

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
    """Proposes the last token again, after `delay_s`; remembers the sessions that it holds."""

    name = "slow"
    learns = False

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.tokens: dict[int, list[int]] = {}
        self.batches: list[int] = []

    def open(self, session: SessionOpen) -> None:
        self.tokens[session.session_id] = list(session.token_ids)

    def commit(self, session_id: int, new_tokens: Sequence[int], candidates: object = ()) -> None:
        self.tokens[session_id].extend(new_tokens)

    def propose(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
        self.entered.set()
        self.gate.wait(WAIT_S)
        time.sleep(self.delay_s)
        self.batches.append(len(queries))
        return [
            SessionDraft(q.session_id, q.epoch, (self.tokens[q.session_id][-1],) * q.budget, drafter="slow")
            for q in queries
        ]

    def close(self, session_id: int) -> None:
        del self.tokens[session_id]

    def reset(self) -> None: ...


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


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


@pytest.fixture
def sources() -> Iterator[Callable[..., RemoteDraftSource]]:
    made: list[RemoteDraftSource] = []

    def make(  # type: ignore[no-untyped-def]
        address: Worker | str,
        connect: bool = True,
        vocab_size: int = 100,
        tokenizer_hash: str = "hash",
        tokenizer: TextTokenizer | None = None,
        **options: object,
    ):
        where = address.address if isinstance(address, Worker) else address
        source = RemoteDraftSource(
            lambda: [{"id": "worker", "address": where}],
            TargetIdentity(
                f"target-{len(made)}",
                "model",
                vocab_size,
                tokenizer.vocab_hash if tokenizer else tokenizer_hash,
                partial(pack, tokenizer) if tokenizer else None,
            ),
            LinkOptions(backoff_s=0.05, max_backoff_s=0.2, **options),  # type: ignore[arg-type]
            flush_tokens=4,
        )
        made.append(source)
        if connect:
            until(lambda: source.connected)
        return source

    yield make
    for source in made:
        source.close()


def model_free() -> DrafterPool:
    return DrafterPool([PromptLookupDrafter(), TokenRecyclingDrafter()], max_sessions=8)


def drafted(source: RemoteDraftSource, update: SessionUpdate, timeout_s: float = WAIT_S) -> SessionDraft:
    source.submit([update])
    return source.collect({update.session_id: update.epoch}, timeout_s)[update.session_id]


# Messages


def test_messages_survive_the_wire() -> None:
    opened = replace(session(2**63, [1, 2**31], epoch=9), trees=True)
    assert codec.open_from_proto(_again(codec.open_to_proto(opened))) == opened
    update = SessionUpdate(4, 7, (1, 2), 5, 3, 2, ((8, (9, 10)), (11, ())), "nested", 12)
    assert codec.update_from_proto(_again(codec.update_to_proto(update))) == update
    assert codec.update_from_proto(codec.update_to_proto(wish(0, 1))) == wish(0, 1)
    assigned = wish(0, 1, nested=NestedWish(4, 0, 8, 2))
    assert codec.update_from_proto(_again(codec.update_to_proto(assigned))) == assigned
    q = (((1,), (1.0,)), ((2, 3), (0.5, 0.5)))
    draft = SessionDraft(4, 7, (1, 2), (-1, -1), "tree", 6, (0.5, 0.25), ("nested", "x"), q)
    assert codec.draft_from_proto(_again(codec.draft_to_proto(draft))) == draft


@pytest.mark.parametrize("code", get_args(DraftErrorCode))
def test_every_error_survives_the_wire(code: DraftErrorCode) -> None:
    draft = SessionDraft(1, 2, error=code, error_message="why")
    assert codec.draft_from_proto(_again(codec.draft_to_proto(draft))) == draft


@pytest.mark.parametrize(
    "broken",
    [
        {"token_ids": []},
        {"prompt_len": 9},
        {"sampling": pb.DraftSampling(temperature=float("nan"), top_p=1.0)},
        {"sampling": pb.DraftSampling(temperature=1.0, top_p=0.0)},
    ],
)
def test_nonsense_is_refused(broken: dict[str, object]) -> None:
    fields = {"session_id": 1, "token_ids": [1], "prompt_len": 1, "sampling": pb.DraftSampling(top_p=1.0)}
    codec.open_from_proto(pb.SessionOpen(**fields))
    with pytest.raises(ValueError, match=r"token_ids|sampling"):
        codec.open_from_proto(pb.SessionOpen(**(fields | broken)))


def _again(message):  # type: ignore[no-untyped-def]
    return type(message).FromString(message.SerializeToString())


# The ledger


def reply(ledger: SessionLedger, draft: SessionDraft, now: float = 0.0) -> SessionDraft | None:
    return ledger.answer(codec.draft_to_proto(draft), now)


def test_ledger_opens_lazily_and_accumulates() -> None:
    ledger = SessionLedger(flush_tokens=3)
    ledger.open(session(5, [1, 2]))
    assert ledger.round([wish(5, 1, [3], budget=0)], 0.0) is None
    message = ledger.round([wish(5, 2, [4])], 0.0)
    assert message is not None
    assert list(message.opens[0].token_ids) == [1, 2, 3, 4]
    assert (message.opens[0].prompt_len, message.updates[0].epoch) == (2, 1)
    assert ledger.awaits(5, 2)
    assert reply(ledger, SessionDraft(5, 1, (9,))) == SessionDraft(5, 2, (9,))
    assert not ledger.awaits(5, 2)
    assert reply(ledger, SessionDraft(5, 1, (9,))) is None, "an answer counts once"
    assert ledger.round([wish(5, 3, [5], budget=0)], 0.0) is None
    assert ledger.round([wish(5, 4, [6], budget=0)], 0.0) is None
    flushed = ledger.round([wish(5, 5, [7], budget=0)], 0.0)
    assert flushed is not None
    assert (list(flushed.updates[0].new_token_ids), flushed.updates[0].epoch) == ([5, 6, 7], 2)
    ledger.close(5)
    closing = ledger.flush()
    assert closing is not None
    assert list(closing.closes) == [5]
    assert ledger.flush() is None


def test_ledger_opens_again_after_errors_and_ignores_a_former_life() -> None:
    ledger = SessionLedger()
    ledger.open(session(5, [1]))
    ledger.round([wish(5, 1, [2])], 0.0)
    answer = reply(ledger, SessionDraft(5, 1, error="unknown_session"))
    assert answer is not None
    assert answer.error == "unknown_session"
    again = ledger.round([wish(5, 2, [3])], 0.0)
    assert again is not None
    assert (list(again.opens[0].token_ids), again.opens[0].epoch, again.updates[0].epoch) == ([1, 2, 3], 1, 2)
    assert reply(ledger, SessionDraft(5, 1, error="stale_epoch")) is None
    assert ledger.awaits(5, 2)
    reply(ledger, SessionDraft(5, 2, error="capacity"), 10.0)
    assert ledger.round([wish(5, 3, [4])], 10.0 + RETRY_S / 2) is None
    retry = ledger.round([wish(5, 4, [5])], 10.0 + RETRY_S)
    assert retry is not None
    assert list(retry.updates[0].new_token_ids) == [4, 5]


def test_a_draft_that_makes_no_sense_is_one_that_failed() -> None:
    ledger = SessionLedger(flush_tokens=3)
    ledger.open(session(5, [1]))
    ledger.round([wish(5, 1)], 0.0)
    message = pb.SessionDraft(session_id=5, epoch=1, token_ids=[1, 2], parents=[1, 0])
    answer = ledger.answer(message, 0.0)
    assert answer is not None
    assert answer.error == "internal"
    assert "parent" in answer.error_message


def test_ledger_asks_for_shadow_drafts_and_takes_each_once() -> None:
    ledger = SessionLedger()
    ledger.open(session(5, [1]))
    asked = ledger.round([wish(5, 7, [2], budget=0, nested=NestedWish(shadow_exit=4, shadow_length=2))], 0.0)
    assert asked is not None
    assert len(asked.opens) == 1
    (update,) = asked.updates
    assert (update.budget, update.nested.shadow_exit, update.nested.shadow_length) == (0, 4, 2)
    assert not ledger.awaits(5, 7), "nobody waits for it"
    shadow = codec.draft_to_proto(SessionDraft(5, update.epoch, (8, 9), exit_depth=4))
    assert ledger.shadow(codec.draft_to_proto(SessionDraft(5, update.epoch + 1))) is None
    assert ledger.shadow(shadow) == SessionDraft(5, 7, (8, 9), exit_depth=4)
    assert ledger.shadow(shadow) is None
    ledger.round([wish(5, 8, [3], nested=NestedWish(shadow_exit=4, shadow_length=2))], 0.0)
    ledger.disconnected()
    shadow.epoch += 1
    assert ledger.shadow(shadow) is None, "the worker is another one"


# The stream


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
    source.reset()
    assert drafted(source, wish(1, 5, [50], drafter="token_recycling")).token_ids == ()
    source.close_session(1)
    until(lambda: worker.sessions() == 0)
    stats = source.stats()
    assert (stats["connected"], stats["rounds"], stats["late_rounds"]) == (True, 5, 0)
    assert stats["address"] == worker.address
    assert isinstance(stats["round_trip_ms"], float)


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


# The protocol, by a plain client


@dataclass
class Plain:
    """A stream driven by hand."""

    call: grpc.aio.StreamStreamCall[pb.DraftRound, pb.DraftReply]

    async def ask(self, **fields: object) -> pb.DraftReply:
        await self.call.write(pb.DraftRound(**fields))  # type: ignore[arg-type]
        return await asyncio.wait_for(self.call.read(), WAIT_S)  # type: ignore[return-value]


async def test_unknown_sessions_and_stale_epochs_are_reported(worker: Worker) -> None:
    worker.start(model_free())
    hello = pb.Hello(target_id="t", model="m", vocab_size=10)
    async with grpc.aio.insecure_channel(worker.address) as channel:
        stub = pb_grpc.DraftServiceStub(channel)
        stream = Plain(stub.Draft())
        greeting = await stream.ask(round_id=1, hello=hello)
        assert (greeting.round_id, list(greeting.drafters)) == (1, ["prompt_lookup", "token_recycling"])
        reply = await stream.ask(round_id=2, updates=[pb.SessionUpdate(session_id=3, epoch=1, budget=1)])
        assert reply.drafts[0].error == pb.DRAFT_ERROR_UNKNOWN_SESSION
        assert list(reply.drafters) == []
        opened = codec.open_to_proto(session(3, [1, 2, 1], epoch=5))
        reply = await stream.ask(opens=[opened], updates=[pb.SessionUpdate(session_id=3, epoch=5, budget=1)])
        assert reply.drafts[0].error == pb.DRAFT_ERROR_STALE_EPOCH
        assert "epoch 5 does not follow 5" in reply.drafts[0].error_message
        reply = await stream.ask(
            updates=[pb.SessionUpdate(session_id=3, epoch=6, new_token_ids=[2], budget=1)]
        )
        assert list(reply.drafts[0].token_ids) == [1]
        reply = await stream.ask(updates=[pb.SessionUpdate(session_id=3, epoch=7)])
        assert len(reply.drafts) == 0, "no wish, no draft"
        state = await stub.GetDraftWorkerState(pb.GetDraftWorkerStateRequest())
        assert (state.worker_id, state.sessions, state.streams, state.rounds) == ("worker", 1, 1, 5)
        assert state.incarnation == greeting.incarnation
        await stream.call.done_writing()
        assert await stream.call.code() == grpc.StatusCode.OK

        silent = stub.Draft()
        await silent.write(pb.DraftRound(round_id=1))
        assert await silent.code() == grpc.StatusCode.INVALID_ARGUMENT
        nonsense = Plain(stub.Draft())
        await nonsense.ask(hello=hello)
        await nonsense.call.write(pb.DraftRound(opens=[pb.SessionOpen(session_id=1)]))
        assert await nonsense.call.code() == grpc.StatusCode.INVALID_ARGUMENT
    until(lambda: worker.server is not None and worker.server.state.streams == 0)


async def test_other_vocabularies_are_refused(worker: Worker, sources) -> None:  # type: ignore[no-untyped-def]
    """A drafter whose own tokenizer is not known can serve nobody but its like, padding aside."""
    worker.start(model_free(), vocabulary=DraftVocabulary(100, "hash"))
    assert sources(worker).connected
    assert sources(worker, vocab_size=128).connected
    for hello, words in (
        (pb.Hello(vocab_size=99), ("99", "100")),
        (pb.Hello(vocab_size=100, tokenizer_hash="other"), ("other", "hash", "100")),
    ):
        async with grpc.aio.insecure_channel(worker.address) as channel:
            call = pb_grpc.DraftServiceStub(channel).Draft()
            await call.write(pb.DraftRound(hello=hello))
            assert await call.code() == grpc.StatusCode.FAILED_PRECONDITION
            details = await call.details()
            assert all(word in details for word in words)
    refused = sources(worker, connect=False, vocab_size=7, tokenizer_hash="")
    until(lambda: "FAILED_PRECONDITION" in str(refused.stats()["last_error"]))
    assert not refused.connected


async def test_health_and_reflection(worker: Worker) -> None:
    worker.start(model_free(), token="secret")
    async with grpc.aio.insecure_channel(worker.address) as channel:
        for name in ("", "s2d.v1.DraftService"):
            check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
            assert (await check).status == health_pb2.HealthCheckResponse.SERVING
        listing = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]),
            metadata=(("authorization", "Bearer secret"),),
        )
        names = [s.name async for r in listing for s in r.list_services_response.service]
        assert "s2d.v1.DraftService" in names
        assert "grpc.health.v1.Health" in names


def test_the_shared_token_is_checked(worker: Worker, sources) -> None:  # type: ignore[no-untyped-def]
    worker.start(model_free(), token="secret")
    assert sources(worker, token="secret").connected
    for token in (None, "wrong"):
        source = sources(worker, connect=False, token=token)
        until(lambda: "UNAUTHENTICATED" in str(source.stats()["last_error"]))  # noqa: B023
        assert not source.connected
    with grpc.insecure_channel(worker.address) as channel:
        stub = pb_grpc.DraftServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetDraftWorkerState(pb.GetDraftWorkerStateRequest(), timeout=WAIT_S)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


@dataclass(frozen=True)
class Files:
    cert: Path
    key: Path
    ca: Path


def _certificates(folder: Path, name: str) -> Files:
    """A new authority and a certificate for 127.0.0.1 that it signed."""
    now = datetime.datetime.now(datetime.UTC)

    names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])

    def sign(subject: str, key, issuer: str, by, authority: bool):  # type: ignore[no-untyped-def]
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(names, critical=False)
            .sign(by, hashes.SHA256())
        )

    authority, own = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    files = Files(*(folder / f"{name}.{part}" for part in ("crt", "key", "ca")))
    pem = serialization.Encoding.PEM
    files.ca.write_bytes(sign(name, authority, name, authority, True).public_bytes(pem))
    files.cert.write_bytes(sign(f"{name}-leaf", own, name, authority, False).public_bytes(pem))
    files.key.write_bytes(
        own.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


def test_mutual_tls(worker: Worker, sources, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    ours, theirs = _certificates(tmp_path, "ours"), _certificates(tmp_path, "theirs")
    worker.start(model_free(), tls=ours)
    source = sources(worker, tls=ours)
    source.open(session(1, [1, 2, 3, 1, 2]))
    assert drafted(source, wish(1, 1)).token_ids == (3, 1)
    stranger = sources(worker, connect=False, tls=Files(theirs.cert, theirs.key, ours.ca))
    unsure = sources(worker, connect=False, tls=Files(ours.cert, ours.key, theirs.ca))
    plain = sources(worker, connect=False)
    for refused in (stranger, unsure, plain):
        until(lambda: "UNAVAILABLE" in str(refused.stats()["last_error"]))  # noqa: B023
        assert not refused.connected


async def test_ports_and_configuration() -> None:
    config = DraftPoolConfig(port_range=(19310, 19312), max_sessions=3)
    first, second = build_draft_server(config, "a"), build_draft_server(config, "b")
    try:
        ports = [int((await server.start()).rpartition(":")[2]) for server in (first, second)]
        assert len(set(ports)) == 2
        assert all(19310 <= port <= 19312 for port in ports)
        full = DraftServer(model_free(), "c", port_range=(ports[0], ports[0]))
        with pytest.raises(OSError, match="no free port"):
            await full.start()
    finally:
        await first.stop(0.0)
        await second.stop(0.0)


def test_a_configured_nested_drafter_drafts_over_the_wire(  # type: ignore[no-untyped-def]
    worker: Worker, sources, tmp_path: Path
) -> None:
    folder = byte_level_folder(tiny_llama(tmp_path))
    config = DraftPoolConfig.model_validate(
        {
            "drafters": ["nested", "prompt_lookup"],
            "nested": {"source": str(folder), "exits": [1, 3], "dtype": "float32", "kv_blocks": 16},
            "port_range": [0, 0],
        }
    )
    worker.run(build_draft_server(config, "worker"))
    refused = sources(worker, connect=False)
    until(lambda: "320" in str(refused.stats()["last_error"]))
    assert "100" in str(refused.stats()["last_error"])
    source = sources(worker, vocab_size=320, tokenizer_hash=TextTokenizer(folder).vocab_hash)
    source.open(session(1, [i * 7 % 320 for i in range(200)]))
    epochs = iter(range(1, 1000))
    # The prompt is absorbed in the background; until then there is nothing, or what prompt lookup finds.
    until(lambda: drafted(source, wish(1, next(epochs))).drafter == "nested")
    until(lambda: drafted(source, wish(1, next(epochs), exit_depth=3)).drafter == "nested")
    deep = drafted(source, wish(1, next(epochs), budget=4, exit_depth=3))
    assert (len(deep.token_ids), deep.exit_depth, len(deep.confidence)) == (4, 3, 4)
    again = drafted(source, wish(1, next(epochs), deep.token_ids[:2], budget=2, exit_depth=3))
    assert again.token_ids == deep.token_ids[2:]
    assert worker.server is not None
    assert worker.server.state.kv_blocks_used == 7
    source.close_session(1)
    until(lambda: worker.server is not None and worker.server.state.kv_blocks_used == 0)


def nested_pool(folder: Path) -> DraftPoolConfig:
    return DraftPoolConfig.model_validate(
        {
            "drafters": ["nested"],
            "nested": {"source": str(folder), "exits": [1, 3], "dtype": "float32", "kv_blocks": 64},
            "port_range": [0, 0],
        }
    )


def test_a_target_of_another_tokenizer_sends_it_and_is_drafted_for(  # type: ignore[no-untyped-def]
    worker: Worker, sources, tmp_path: Path
) -> None:
    draft = byte_level_folder(tiny_llama(tmp_path / "draft"))
    target = TextTokenizer(byte_fallback_folder(tmp_path / "target"))
    worker.run(build_draft_server(nested_pool(draft), "worker"))
    unknown = sources(worker, connect=False, vocab_size=299, tokenizer_hash=target.vocab_hash)
    until(lambda: "NOT_FOUND" in str(unknown.stats()["last_error"]))
    assert all(size in str(unknown.stats()["last_error"]) for size in ("299", "320"))

    source = sources(worker, vocab_size=target.vocab_size, tokenizer=target)
    again = sources(worker, vocab_size=target.vocab_size, tokenizer_hash=target.vocab_hash)
    assert again.connected, "the worker keeps the tokenizer"
    for sid, sampling in ((1, DraftSampling(key=5)), (2, DraftSampling(key=5, temperature=1.0))):
        prompt = target.encode("the end of the day " * 20)
        source.open(SessionOpen(sid, tuple(prompt), len(prompt), sampling))
        # A draft with random weights often guesses bytes that are no text: then there is no draft.
        epochs = iter(range(1, 1000))
        proposals: list[SessionDraft] = []

        def nested() -> bool:
            update = wish(sid, next(epochs), prompt[:1], budget=6)  # noqa: B023
            proposals.append(drafted(source, update))  # noqa: B023
            return sum(p.drafter == "nested" for p in proposals) >= 3  # noqa: B023

        until(nested)
        assert all(p.error is None for p in proposals)
        ids = {i for p in proposals for i in p.token_ids}
        assert max(ids) < target.vocab_size
        assert not ids & target.special_ids - set(target.eos_token_ids)


def test_a_target_padded_beyond_the_draft_is_served(  # type: ignore[no-untyped-def]
    worker: Worker, sources, tmp_path: Path
) -> None:
    folder = byte_level_folder(tiny_llama(tmp_path))
    worker.run(build_draft_server(nested_pool(folder), "worker"))
    source = sources(worker, vocab_size=512, tokenizer_hash=TextTokenizer(folder).vocab_hash)
    source.open(session(1, [5, 6, 7]))
    assert len(drafted(source, wish(1, 1)).token_ids) == 2
    source.open(session(2, [5, 400]))
    refused = drafted(source, wish(2, 1))
    assert (refused.error, refused.token_ids) == ("unsupported", ())
    assert "400" in refused.error_message
    assert "320" in refused.error_message


def chunks(tokenizer: TextTokenizer, **changes: object) -> list[pb.TokenizerChunk]:
    file = pack(tokenizer)
    fields = {"tokenizer_hash": file.vocab_hash, "vocab_size": tokenizer.vocab_size, "data": file.packed}
    return [pb.TokenizerChunk(**{**fields, **changes})]  # type: ignore[arg-type]


async def test_tokenizers_that_cannot_be_used_are_refused(worker: Worker, tmp_path: Path) -> None:
    draft = byte_level_folder(tiny_llama(tmp_path / "draft"))
    target = TextTokenizer(byte_fallback_folder(tmp_path / "target"))
    greek = Tokenizer(models.BPE(vocab={"αβγ": 0, "δεζ": 1}, merges=[]))
    greek.decoder = decoders.Fuse()
    stranger = pack(TokenTable(greek))
    worker.run(build_draft_server(nested_pool(draft), "worker"))
    packed = pack(target).packed
    huge = [pb.TokenizerChunk(data=b"\0" * (17 << 20))] * 2
    async with grpc.aio.insecure_channel(worker.address) as channel:
        stub = pb_grpc.DraftServiceStub(channel)
        for sent, code, words in (
            (chunks(target, tokenizer_hash="0" * 64), grpc.StatusCode.INVALID_ARGUMENT, ("0" * 12,)),
            (chunks(target, data=packed[:-9]), grpc.StatusCode.INVALID_ARGUMENT, ("cut short",)),
            (chunks(target, data=b"nonsense"), grpc.StatusCode.INVALID_ARGUMENT, ("unpacked",)),
            ([], grpc.StatusCode.INVALID_ARGUMENT, ("no tokenizer",)),
            (huge, grpc.StatusCode.INVALID_ARGUMENT, ("more than",)),
            (
                [pb.TokenizerChunk(tokenizer_hash=stranger.vocab_hash, vocab_size=7, data=stranger.packed)],
                grpc.StatusCode.FAILED_PRECONDITION,
                ("7 tokens", "320"),
            ),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.SendTokenizer(iter(sent))
            assert caught.value.code() == code
            assert all(word in str(caught.value.details()) for word in words)
        call = stub.Draft()  # the refusal is remembered
        await call.write(pb.DraftRound(hello=pb.Hello(vocab_size=7, tokenizer_hash=stranger.vocab_hash)))
        assert await call.code() == grpc.StatusCode.FAILED_PRECONDITION
        receipt = await stub.SendTokenizer(iter(chunks(target)))
        assert receipt.draft_vocab_size == 320
        assert 256 <= receipt.shared_tokens <= target.vocab_size


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


def test_wildcard_hosts_are_published_reachably() -> None:
    worker = Worker()
    try:
        address = worker.start(model_free(), host="0.0.0.0")
        assert not address.startswith("0.0.0.0")
    finally:
        worker.close()
