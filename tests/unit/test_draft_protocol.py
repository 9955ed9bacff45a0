"""The drafting service as a plain client sees it: protocol, health, secrets, ports."""

from __future__ import annotations

import asyncio
import datetime
import logging
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from actors.draft_worker import service
from actors.draft_worker.batcher import DraftBatcher
from actors.draft_worker.server import DraftServer, build_draft_server
from actors.draft_worker.vocabularies import DraftVocabulary
from actors.drafting import codec
from cluster.config import DraftPoolConfig
from cluster.gateway.serve_clients import LeasedDraftPool
from cluster.registry import Lease, RegistryClient
from protos.s2d.v1 import drafting_pb2 as pb
from protos.s2d.v1 import drafting_pb2_grpc as pb_grpc
from tests.draft_rig import WAIT_S, Worker, drafted, model_free, session, until, wish


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


async def test_shadow_drafts_that_are_not_taken_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_UNANSWERED", 2)
    stream = service._Stream(DraftBatcher(model_free()), "one", "v", None, ahead=False, weight=1.0)
    for round_id in (1, 2, 3):
        stream._put_shadow(pb.DraftReply(round_id=round_id, shadows=[pb.SessionDraft()]))
    taken = [await stream.next_reply() for _ in range(2)]
    stream._put_shadow(pb.DraftReply(round_id=4, shadows=[pb.SessionDraft()]))
    taken.append(await stream.next_reply())
    assert [reply.round_id for reply in taken if reply is not None] == [1, 2, 4]


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


def test_a_certificate_that_is_away_for_a_moment_is_waited_for(  # type: ignore[no-untyped-def]
    worker: Worker, sources, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "actors.drafting.remote_link")
    ours = _certificates(tmp_path, "ours")
    worker.start(model_free(), tls=ours)
    away = ours.key.rename(tmp_path / "away")
    source = sources(worker, connect=False, tls=ours)
    until(lambda: len(caplog.records) >= 3)
    assert not source.connected
    levels = [record.levelname for record in caplog.records]
    assert (levels[0], set(levels[1:])) == ("WARNING", {"DEBUG"}), "said once"
    assert ours.key.name in caplog.text
    away.rename(ours.key)
    until(lambda: source.connected)


async def test_the_gateway_shows_workers_that_it_has_no_certificate_for(
    worker: Worker, tmp_path: Path
) -> None:
    ours = _certificates(tmp_path, "ours")
    worker.start(model_free(), tls=ours)

    async def living(max_age_s: float) -> list[Lease]:
        return [Lease("a", "1", worker.address)]

    config = DraftPoolConfig.model_validate({"tls": {f: getattr(ours, f) for f in ("cert", "key", "ca")}})
    pool = LeasedDraftPool(config, cast(RegistryClient, SimpleNamespace(living=living)))
    (state,) = await pool.states()
    assert (state["error"], state["worker_id"]) == (None, "worker")
    ours.key.unlink()
    (state,) = await pool.states()
    assert str(state["error"]).startswith("UNAVAILABLE: ")
    assert (state["id"], state["address"]) == ("a", worker.address)


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


def test_wildcard_hosts_are_published_reachably() -> None:
    worker = Worker()
    try:
        address = worker.start(model_free(), host="0.0.0.0")
        assert not address.startswith("0.0.0.0")
    finally:
        worker.close()
