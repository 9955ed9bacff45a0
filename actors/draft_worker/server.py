"""A draft worker's gRPC server: ports, TLS, shared token, health and reflection."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from actors.draft_worker.batcher import BatcherState, DraftBatcher
from actors.draft_worker.service import AheadPolicy, DraftService
from actors.draft_worker.vocabularies import DraftVocabulary
from actors.drafting.interface import Drafter
from actors.drafting.model_free import MODEL_FREE
from actors.drafting.remote_link import MAX_MESSAGE_BYTES, TLSFiles
from actors.drafting.selector import DrafterPool
from actors.models.cores import Cores, bind_threads
from protos.s2d.v1 import drafting_pb2 as pb
from protos.s2d.v1 import drafting_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from actors.drafting.nested_load import NestedConfig

logger = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["DraftService"].full_name
_OPEN_PREFIX = f"/{health.SERVICE_NAME}/"


class PoolConfig(Protocol):
    """See `cluster.config.DraftPoolConfig`."""

    @property
    def drafters(self) -> Sequence[str]: ...

    @property
    def nested(self) -> NestedConfig | None: ...

    @property
    def port_range(self) -> tuple[int, int]: ...

    @property
    def host(self) -> str: ...

    @property
    def max_sessions(self) -> int: ...

    @property
    def cpus(self) -> Sequence[int]: ...

    @property
    def compute_threads(self) -> int: ...

    @property
    def torch_device(self) -> str: ...

    @property
    def token(self) -> str | None: ...

    @property
    def tls(self) -> TLSFiles | None: ...

    @property
    def draft_ahead(self) -> bool | None: ...


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses calls without `authorization: Bearer TOKEN`, except health checks: probes carry no secrets."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[Any]],
        handler_call_details: Any,
    ) -> Any:
        if handler_call_details.method.startswith(_OPEN_PREFIX):
            return await continuation(handler_call_details)
        metadata = dict(handler_call_details.invocation_metadata or ())
        given = metadata.get("authorization", "")
        given = given.encode() if isinstance(given, str) else given
        if hmac.compare_digest(given, self._expected):
            return await continuation(handler_call_details)
        return _refuse_like(await continuation(handler_call_details))


def _refuse_like(handler: Any) -> Any:
    """A handler of the same shape that answers UNAUTHENTICATED."""

    async def refuse(request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the shared token is missing or wrong")

    async def refuse_stream(request: Any, context: Any) -> Any:
        await refuse(request, context)
        yield None

    if handler is None:
        return None
    if handler.request_streaming:
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(refuse_stream)
        return grpc.stream_unary_rpc_method_handler(refuse)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(refuse_stream)
    return grpc.unary_unary_rpc_method_handler(refuse)


class DraftServer:
    """One draft worker's server. Construct it anywhere, `start` and `stop` it on the event loop it runs on.

    Args:
        pool: the drafters; the server's drafting thread owns them from `start` on.
        worker_id: for reports.
        host: address to listen on.
        port_range: the first free port is taken, both ends included; (0, 0) takes any.
        token: shared secret that every call but health checks must present.
        tls: with it, targets must present a certificate that its authority signed.
        vocabulary: of the nested drafter, which targets share or are re-tokenised for; None without one.
        max_queued: rounds that wait for the drafting thread, at most.
        draft_ahead: for which targets drafts are prepared while they verify; None for none.
    """

    def __init__(
        self,
        pool: DrafterPool,
        worker_id: str,
        *,
        host: str = "127.0.0.1",
        port_range: tuple[int, int] = (9100, 9199),
        token: str | None = None,
        tls: TLSFiles | None = None,
        vocabulary: DraftVocabulary | None = None,
        max_queued: int = 256,
        draft_ahead: AheadPolicy | None = None,
    ) -> None:
        self.incarnation = secrets.token_hex(8)
        self._worker_id = worker_id
        self._host = host
        self._port_range = port_range
        self._token = token
        self._tls = tls
        self._batcher = DraftBatcher(pool, max_queued)
        self._service = DraftService(self._batcher, worker_id, self.incarnation, vocabulary, draft_ahead)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._server: grpc.aio.Server | None = None

    async def start(self) -> str:
        """Listen; returns "host:port" as targets reach it. Raises OSError when no port is free."""
        server, port = _bind(self._host, self._port_range, self._token, self._tls)
        pb_grpc.add_DraftServiceServicer_to_server(self._service, server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        self._batcher.start()
        await server.start()
        self._server = server
        for name in ("", SERVICE_NAME):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        address = f"{_reachable(self._host)}:{port}"
        logger.info("draft worker %s listens on %s", self._worker_id, address)
        return address

    @property
    def state(self) -> BatcherState:
        """A snapshot; safe from any thread."""
        return self._batcher.state()

    def step_s_by_exit(self) -> Mapping[int, Mapping[int, float]]:
        """Measured seconds of a draft step by exit depth and number of sessions; safe from any thread."""
        return self._batcher.pool.step_s_by_exit()

    async def stop(self, grace: float = 1.0) -> None:
        """Report NOT_SERVING, end streams after `grace` seconds, stop the drafting thread."""
        if self._server is not None:
            await self._health.enter_graceful_shutdown()
            await self._server.stop(grace)
            self._server = None
        await asyncio.to_thread(self._batcher.stop)


def _bind(
    host: str, port_range: tuple[int, int], token: str | None, tls: TLSFiles | None
) -> tuple[grpc.aio.Server, int]:
    """A server bound to the first free port of the range."""
    for port in range(port_range[0], port_range[1] + 1):
        # A server that failed to bind is not reused: gRPC keeps what it bound so far.
        server = grpc.aio.server(
            interceptors=[TokenInterceptor(token)] if token else None,
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.keepalive_time_ms", 2000),
                ("grpc.keepalive_timeout_ms", 2000),
                ("grpc.http2.ping_timeout_ms", 2000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.max_pings_without_data", 0),
                # Targets ping every second to notice a dead worker soon.
                ("grpc.http2.min_ping_interval_without_data_ms", 500),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
                ("grpc.http2.max_ping_strikes", 0),
            ],
        )
        try:
            if tls is None:
                bound = server.add_insecure_port(f"{host}:{port}")
            else:
                bound = server.add_secure_port(f"{host}:{port}", _server_credentials(tls))
        except RuntimeError:
            continue
        if bound:
            return server, bound
    raise OSError(f"no free port in {port_range[0]}-{port_range[1]} on {host}")


def _server_credentials(tls: TLSFiles) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials(
        [(tls.key.read_bytes(), tls.cert.read_bytes())],
        root_certificates=tls.ca.read_bytes(),
        require_client_auth=True,
    )


def _reachable(host: str) -> str:
    """The address that other machines use: a wildcard becomes that of the interface facing outwards."""
    if host not in ("0.0.0.0", "::", "[::]"):
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Connecting a datagram socket sends nothing; it only asks the routing table.
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


@dataclass(frozen=True, slots=True)
class LoadedPool:
    """The configured drafters, and of the nested drafter, if there is one, its vocabulary and its cores."""

    pool: DrafterPool
    vocabulary: DraftVocabulary | None = None
    cores: Cores = field(default_factory=Cores)


def build_pool(config: PoolConfig) -> LoadedPool:
    """Blocking: seconds with a nested drafter. Raises ValueError for a drafter that is not configured."""
    drafters: list[Drafter] = []
    vocabulary: DraftVocabulary | None = None
    cores = Cores()
    for name in config.drafters:
        if name in MODEL_FREE:
            drafters.append(MODEL_FREE[name](config.max_sessions))
        elif name == "nested" and config.nested is not None:
            # Imported here because a worker without a model needs neither torch nor transformers.
            from actors.drafting.draft_ahead import AheadDrafter
            from actors.drafting.nested_load import load_nested
            from actors.drafting.retokenised import RetokenisedDrafter

            nested = load_nested(
                config.nested, config.max_sessions, config.compute_threads, device=config.torch_device
            )
            nested.drafter.profile()
            drafters.append(AheadDrafter(RetokenisedDrafter(nested.drafter, nested.vocab_size)))
            cores = nested.cores
            tokenizer = nested.tokenizer
            vocabulary = DraftVocabulary(nested.vocab_size, tokenizer.vocab_hash, tokenizer)
        else:
            raise ValueError(f"drafters: {name!r} is unknown or not configured")
    return LoadedPool(DrafterPool(drafters, config.max_sessions), vocabulary, cores)


def build_draft_server(config: PoolConfig, worker_id: str) -> DraftServer:
    """A server as configured, drafters loaded (blocking: seconds with a nested drafter), not yet started.
    Binds this process to the configured CPUs; raises ValueError for those that are not there."""
    bind_threads(config.cpus, "draft_pool.cpus")
    loaded = build_pool(config)
    return DraftServer(
        loaded.pool,
        worker_id,
        host=config.host,
        port_range=config.port_range,
        token=config.token,
        tls=config.tls,
        vocabulary=loaded.vocabulary,
        draft_ahead=AheadPolicy(config.draft_ahead, loaded.cores),
    )
