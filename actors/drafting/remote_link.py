"""The connection of a target worker to a draft worker: one bidirectional gRPC stream, kept alive.

A supervisor thread chooses a lease, connects, watches and reconnects with backoff; a reader thread per
connection hands replies on. Neither ever holds the engine up: sending puts a message into a bounded queue.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import grpc

from actors.drafting.interface import TargetIdentity
from protos.s2d.v1 import drafting_pb2 as pb
from protos.s2d.v1 import drafting_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from actors.text.tokenizer_file import TokenizerFile

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
TOKENIZER_CHUNK_BYTES = 1 << 20
TOKENIZER_TIMEOUT_S = 60.0
"""For sending a tokenizer and for the worker to take it in."""
Lease = Mapping[str, object]
"""What a draft worker publishes: id, incarnation, address ("host:port") and load (a number, optional)."""
LeaseProvider = Callable[[], Sequence[Lease]]
_REFUSALS = (
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
)


class TLSFiles(Protocol):
    """PEM files: own certificate chain and key, and the authority that signed the other side."""

    @property
    def cert(self) -> Path: ...

    @property
    def key(self) -> Path: ...

    @property
    def ca(self) -> Path: ...


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """Times in seconds.

    token: shared secret. tls: files for a mutual TLS connection; server_name overrides the name that the
    worker's certificate must carry. keepalive_s: a ping after this long, and as long to wait for its echo, so
    that a dead peer is noticed within twice that. stuck_s: a round unanswered for this long ends the
    connection. avoid_s: for so long a worker that could not be reached, refused us or got stuck is not tried
    before others.
    vanished_polls: consecutive looks at the leases without ours that end a connection.
    """

    connect_timeout_s: float = 3.0
    backoff_s: float = 0.1
    max_backoff_s: float = 3.0
    keepalive_s: float = 1.0
    stuck_s: float = 10.0
    lease_poll_s: float = 1.0
    avoid_s: float = 10.0
    vanished_polls: int = 3
    send_queue: int = 64
    token: str | None = None
    tls: TLSFiles | None = None
    server_name: str | None = None


class LinkEvents(Protocol):
    """What a link reports, from its own threads."""

    def link_up(self, connection: Connection, hello: pb.DraftReply) -> None: ...

    def link_down(self, connection: Connection, reason: str) -> None: ...

    def link_reply(self, connection: Connection, reply: pb.DraftReply) -> None: ...

    def link_idle(self, connection: Connection) -> None:
        """Nothing was sent for a while: a chance to send what waits for a round."""
        ...


class Connection:
    """One stream to one worker."""

    def __init__(
        self, lease: Lease, identity: TargetIdentity, options: LinkOptions, events: LinkEvents
    ) -> None:
        self.worker_id = str(lease["id"])
        self.address = str(lease["address"])
        self.incarnation = ""
        """The worker's own; known once up."""
        self.lease_incarnation = lease.get("incarnation")
        self.up = threading.Event()
        self.down = threading.Event()
        self.refused = False
        self.wants_tokenizer = False
        """The stream was ended because the worker does not know our tokenizer."""
        self._events = events
        self._outgoing: queue.Queue[pb.DraftRound | None] = queue.Queue(options.send_queue)
        self._sent: dict[int, float] = {}
        self._round_id = 1
        hello = pb.Hello(
            target_id=identity.target_id,
            model=identity.model,
            vocab_size=identity.vocab_size,
            tokenizer_hash=identity.tokenizer_hash,
            host=identity.cores.host,
            cpus=sorted(identity.cores.cpus),
            weight=identity.weight,
        )
        self._channel = _open_channel(self.address, options)
        self._identity = identity
        self._metadata = (("authorization", f"Bearer {options.token}"),) if options.token else None
        self._call = pb_grpc.DraftServiceStub(self._channel).Draft(  # type: ignore[no-untyped-call]
            self._requests(pb.DraftRound(round_id=1, hello=hello)), metadata=self._metadata
        )
        self._reader = threading.Thread(target=self._read, name="s2d-draft-reader", daemon=True)
        self._reader.start()

    def send(self, message: pb.DraftRound) -> bool:
        """Queue a round; False when the queue is full or the stream has ended."""
        if self.down.is_set():
            return False
        self._round_id += 1
        message.round_id = self._round_id
        try:
            self._outgoing.put_nowait(message)
        except queue.Full:
            return False
        self._sent[message.round_id] = time.monotonic()
        return True

    def answered(self, round_id: int) -> float | None:
        """Seconds since the round was sent, once; None for rounds that are not under way."""
        sent = self._sent.pop(round_id, None)
        return None if sent is None else time.monotonic() - sent

    def oldest_wait(self) -> float:
        """Seconds that the oldest unanswered round has waited."""
        sent = next(iter(self._sent.copy().values()), None)
        return 0.0 if sent is None else time.monotonic() - sent

    def cancel(self) -> None:
        """End the stream; `link_down` follows from the reader."""
        self._call.cancel()

    def send_tokenizer(self) -> bool:
        """Tell the worker our tokenizer, seconds; False when it cannot be had or was not taken."""
        if self._identity.tokenizer is None:
            return False
        try:
            receipt = pb_grpc.DraftServiceStub(self._channel).SendTokenizer(  # type: ignore[no-untyped-call]
                _tokenizer_chunks(self._identity.vocab_size, self._identity.tokenizer()),
                metadata=self._metadata,
                timeout=TOKENIZER_TIMEOUT_S,
            )
        except grpc.RpcError as error:
            reason = f"{error.code().name}: {error.details()}"
            logger.warning("draft worker %s does not take our tokenizer: %s", self.address, reason)
            self._events.link_down(self, reason)
            return False
        logger.info(
            "draft worker %s re-tokenises for us: %d tokens are shared, its vocabulary has %d, ours %d",
            self.address,
            receipt.shared_tokens,
            receipt.draft_vocab_size,
            self._identity.vocab_size,
        )
        return True

    def close(self, timeout_s: float = 2.0) -> None:
        self._call.cancel()
        self._reader.join(timeout_s)
        self._channel.close()

    def _requests(self, hello: pb.DraftRound) -> Iterator[pb.DraftRound]:
        yield hello
        while not self.down.is_set():
            try:
                message = self._outgoing.get(timeout=0.1)
            except queue.Empty:
                if self.up.is_set():
                    self._events.link_idle(self)
                continue
            if message is None:
                return
            yield message

    def _read(self) -> None:
        reason = "the worker ended the stream"
        try:
            for reply in self._call:
                if not self.up.is_set():
                    self.incarnation = reply.incarnation
                    self._events.link_up(self, reply)
                    self.up.set()
                else:
                    self._events.link_reply(self, reply)
        except grpc.RpcError as error:
            code = error.code()
            self.refused = code in _REFUSALS
            self.wants_tokenizer = code == grpc.StatusCode.NOT_FOUND
            reason = f"{code.name}: {error.details()}"
        except Exception as error:  # A reply that cannot be read must not leave the engine waiting.
            logger.exception("reading from draft worker %s failed", self.address)
            reason = f"{type(error).__name__}: {error}"
            self._call.cancel()
        finally:
            self.down.set()
            self.up.set()
            try:
                self._outgoing.put_nowait(None)
            except queue.Full:
                logger.debug("send queue to %s is full; the writer sees the end by itself", self.address)
            self._events.link_down(self, reason)


class RemoteLink:
    """Keeps one `Connection` up while there is a lease to connect to: the preferred worker's (`prefer`), or
    the least loaded one's. A worker that just failed comes after all others: nobody drafts with it, so that
    it would be the least loaded one for good."""

    def __init__(
        self, leases: LeaseProvider, identity: TargetIdentity, options: LinkOptions, events: LinkEvents
    ) -> None:
        self._leases = leases
        self._identity = identity
        self._options = options
        self._events = events
        self._stop = threading.Event()
        self._opens = True
        """Whether the last connection could be opened."""
        self._preferred: str | None = None
        self._avoided_until: dict[str, float] = {}
        """By worker: monotonic time until which others are tried first. The link's thread only."""
        self._thread = threading.Thread(target=self._run, name="s2d-draft-link", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def prefer(self, worker_id: str | None) -> None:
        """From any thread. While the worker is not there, or cannot be reached, another serves."""
        self._preferred = worker_id

    def close(self, timeout_s: float = 5.0) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        backoff = self._options.backoff_s
        while not self._stop.is_set():
            lease = self._choose()
            connection = None if lease is None else self._open(lease)
            if connection is not None:
                connection.up.wait(self._options.connect_timeout_s)
                if connection.up.is_set() and not connection.down.is_set():
                    backoff = self._options.backoff_s
                    self._watch(connection)
                elif not connection.wants_tokenizer:
                    self._avoid(connection)
                sent = connection.wants_tokenizer and connection.send_tokenizer()
                connection.close()
                if connection.refused or (connection.wants_tokenizer and not sent):
                    self._avoid(connection)
                    backoff = self._options.max_backoff_s
            # Full jitter would let a fleet of targets reconnect at once now and then; half keeps a floor.
            self._stop.wait(backoff * random.uniform(0.5, 1.0))
            backoff = min(self._options.max_backoff_s, backoff * 2.0)

    def _open(self, lease: Lease) -> Connection | None:
        """None while the files of the certificate cannot be read: they are replaced from time to time."""
        try:
            connection = Connection(lease, self._identity, self._options, self._events)
        except OSError as error:
            level = logging.WARNING if self._opens else logging.DEBUG
            logger.log(level, "no connection to draft worker %s can be opened: %s", lease["id"], error)
            self._opens = False
            return None
        self._opens = True
        return connection

    def _current(self) -> list[Lease] | None:
        """The leases, or None when they cannot be read (then an existing connection goes on)."""
        try:
            return list(self._leases())
        except Exception as error:
            logger.warning("reading the draft workers' leases failed: %s: %s", type(error).__name__, error)
            return None

    def _choose(self) -> Lease | None:
        leases = self._current()
        if not leases:
            return None
        usable = self._usable(leases)
        if not usable:  # they take turns
            return min(leases, key=lambda lease: self._avoided_until[str(lease["id"])])
        return self._preferred_lease(usable) or min(usable, key=_load)

    def _avoid(self, connection: Connection) -> None:
        now = time.monotonic()
        recent = {worker_id: until for worker_id, until in self._avoided_until.items() if until > now}
        self._avoided_until = recent | {connection.worker_id: now + self._options.avoid_s}

    def _usable(self, leases: Sequence[Lease]) -> list[Lease]:
        """Those of workers that did not just fail."""
        now = time.monotonic()
        return [lease for lease in leases if self._avoided_until.get(str(lease["id"]), now) <= now]

    def _preferred_lease(self, leases: Sequence[Lease]) -> Lease | None:
        return next((lease for lease in leases if lease["id"] == self._preferred), None)

    def _watch(self, connection: Connection) -> None:
        """Return when the connection is over, has to be given up, or the link is closed."""
        next_poll = time.monotonic() + self._options.lease_poll_s
        missed = 0
        while not self._stop.is_set() and not connection.down.wait(0.1):
            if connection.oldest_wait() > self._options.stuck_s:
                logger.warning("draft worker %s does not answer; reconnecting", connection.address)
                self._avoid(connection)
                return
            if time.monotonic() < next_poll:
                continue
            next_poll = time.monotonic() + self._options.lease_poll_s
            leases = self._current()
            if leases is None:
                continue
            ours = next((lease for lease in leases if lease["id"] == connection.worker_id), None)
            missed = 0 if ours is not None else missed + 1
            replaced = ours is not None and ours.get("incarnation") != connection.lease_incarnation
            if replaced or missed >= self._options.vanished_polls:
                logger.info("the lease of draft worker %s is gone; reconnecting", connection.worker_id)
                return
            preferred = self._preferred_lease(self._usable(leases))
            if preferred is not None and connection.worker_id != preferred["id"]:
                logger.info("leaving draft worker %s for %s", connection.worker_id, self._preferred)
                return


def _tokenizer_chunks(vocab_size: int, file: TokenizerFile) -> Iterator[pb.TokenizerChunk]:
    yield pb.TokenizerChunk(
        tokenizer_hash=file.vocab_hash,
        vocab_size=vocab_size,
        special_token_ids=file.special_ids,
        eos_token_ids=file.eos_token_ids,
    )
    for begin in range(0, len(file.packed), TOKENIZER_CHUNK_BYTES):
        yield pb.TokenizerChunk(data=file.packed[begin : begin + TOKENIZER_CHUNK_BYTES])


def _load(lease: Lease) -> float:
    load = lease.get("load", 0.0)
    return float(load) if isinstance(load, (int, float)) else 0.0


def _open_channel(address: str, options: LinkOptions) -> grpc.Channel:
    keepalive_ms = int(options.keepalive_s * 1000)
    args: list[tuple[str, int | str]] = [
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", keepalive_ms),
        # The echo of a ping has a limit of its own, a minute by default.
        ("grpc.http2.ping_timeout_ms", keepalive_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        # Backoff is ours: a channel must not inherit the waiting time of a former one.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
    ]
    if options.tls is None:
        return grpc.insecure_channel(address, options=args)
    if options.server_name:
        args.append(("grpc.ssl_target_name_override", options.server_name))
    credentials = grpc.ssl_channel_credentials(
        root_certificates=options.tls.ca.read_bytes(),
        private_key=options.tls.key.read_bytes(),
        certificate_chain=options.tls.cert.read_bytes(),
    )
    return grpc.secure_channel(address, credentials, options=args)
