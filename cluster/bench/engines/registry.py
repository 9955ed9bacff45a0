"""Engines by name. A new one is one line in `FACTORIES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from actors.drafting.model_free import MODEL_FREE
from actors.engine.messages import ResetScope
from cluster.bench.engines.interface import BenchEngine, EngineUnavailableError
from cluster.bench.engines.openai_endpoint import OpenAIEndpoint
from cluster.bench.engines.peer_engine import MAX_CONCURRENCY
from cluster.bench.engines.peers import PEERS, PeerOptions
from cluster.bench.engines.s2d import S2DEngine
from cluster.bench.engines.s2d_server import S2DServer
from cluster.bench.peers.gguf_files import PRECISIONS
from cluster.config import ClusterConfig, DrafterName, EngineConfig, NestedDrafterConfig

Pool = Literal["configured", "model-free", "nested"]
"""Drafters of our server: those of its configuration, the same without or with the nested one."""


@dataclass(slots=True)
class EngineContext:
    """What engines are built from, equal for all of them.

    folder: the model as a Hugging Face folder with weights. source: as in the server's configuration.
    concurrency: requests that may be in flight at once. server_config: what our own server is started with.
    threads: compute threads, 0 lets each engine choose. max_model_len: context that the requests need at
    least; our own server takes its configuration's. api_key: for endpoints given by URL. reset: what our own
    server forgets when it is reset. request_timeout_s: seconds that every engine gives a request at least.
    """

    folder: Path
    source: str
    dtype: str
    server_config: ClusterConfig
    concurrency: int = 1
    threads: int = 0
    max_model_len: int = 2048
    api_key: str | None = None
    reset: ResetScope = "all"
    request_timeout_s: float = 300.0
    _servers: dict[tuple[DrafterName, ...], S2DServer] = field(default_factory=dict)

    def server(self, pool: Pool = "configured") -> S2DServer:
        """One server for each set of drafters: a drafter that computes on the target's cores costs time even
        where it is not chosen."""
        config = self._config(pool)
        drafters = config.draft_pool.drafters
        if drafters not in self._servers:
            self._servers[drafters] = S2DServer(config)
        return self._servers[drafters]

    def _config(self, drafters: Pool) -> ClusterConfig:
        config = self.server_config
        engine = config.models[0].engine
        sizes = {
            "max_num_seqs": max(engine.max_num_seqs, self.concurrency),
            "max_batched_tokens": max(engine.max_batched_tokens, self.concurrency),
            "threads": self.threads or engine.threads,
        }
        widened = EngineConfig.model_validate(engine.model_dump() | sizes)
        models = (config.models[0].model_copy(update={"engine": widened}), *config.models[1:])
        pool = config.draft_pool
        if drafters == "nested" and pool.nested is None:
            layers = NestedDrafterConfig(source=self.source, exits=(2, 4), kv_blocks=256)
            pool = pool.model_copy(update={"nested": layers})
        if drafters == "nested" and "nested" not in pool.drafters:
            pool = pool.model_copy(update={"drafters": (*pool.drafters, "nested")})
        if drafters == "model-free":
            kept = tuple(d for d in pool.drafters if d in MODEL_FREE)
            pool = pool.model_copy(update={"drafters": kept or tuple(MODEL_FREE)})
        patience = max(config.gateway.request_timeout_s, self.request_timeout_s)
        gateway = config.gateway.model_copy(update={"request_timeout_s": patience})
        return config.model_copy(update={"models": models, "draft_pool": pool, "gateway": gateway})


Factory = Callable[[str, EngineContext], BenchEngine]
"""Builds an engine that is not started, under the given name. May raise EngineUnavailableError."""


def _s2d(pool: Pool = "configured", **speculation: Any) -> Factory:
    return lambda name, context: S2DEngine(name, context.server(pool), speculation, context.reset)


def _peer(build: Callable[[PeerOptions], BenchEngine]) -> Factory:
    return lambda name, context: build(
        PeerOptions(
            model=context.source,
            threads=context.threads,
            max_model_len=context.max_model_len,
            max_concurrency=context.concurrency,
            # Peers with int8 weights have the precision in their name.
            dtype="float32" if context.dtype == "float32" else "bfloat16",
            request_timeout_s=context.request_timeout_s,
        )
    )


FACTORIES: Mapping[str, Factory] = {
    "s2d-plain": _s2d(enabled=False),
    "s2d-auto": _s2d(),
    "s2d-model-free": _s2d("model-free"),
    "s2d-prompt_lookup": _s2d("model-free", drafter="prompt_lookup"),
    "s2d-token_recycling": _s2d("model-free", drafter="token_recycling"),
    "s2d-nested": _s2d("nested", drafter="nested"),
    "s2d-all": _s2d("nested"),
    **{name: _peer(build) for name, build in PEERS.items()},
}

_PLAIN = ("s2d-plain", "hf", "vllm-bf16", *(f"llama.cpp-{precision}" for precision in PRECISIONS))


def plain_of(name: str) -> str | None:
    """The engine of the registry that is the same without speculation; None for one that does not speculate,
    and for one that is not known."""
    if name in _PLAIN or name not in FACTORIES:
        return None
    if name.startswith("s2d-"):
        return "s2d-plain"
    return next((plain for plain in _PLAIN if name.startswith(f"{plain}-")), None)


def check(engine: str, concurrency: int = 1) -> tuple[str, str]:
    """(name, URL) of a name of the registry or of NAME=URL; the URL is empty for the former. Raises
    EngineUnavailableError for anything else, and for an engine that takes fewer requests at once."""
    name, equals, url = engine.partition("=")
    if equals and not (name and url.startswith(("http://", "https://"))):
        raise EngineUnavailableError(f"engine {engine!r}: use NAME=URL with an http or https URL")
    if not equals and name not in FACTORIES:
        raise EngineUnavailableError(f"unknown engine {name!r}; known: {', '.join(FACTORIES)}, or NAME=URL")
    if name in PEERS and not url and concurrency > MAX_CONCURRENCY:
        raise EngineUnavailableError(
            f"{name} takes at most {MAX_CONCURRENCY} requests at once, not {concurrency}"
        )
    return name, url


def create(engine: str, context: EngineContext) -> BenchEngine:
    """By a name of the registry, or NAME=URL for an OpenAI endpoint that is running already. Raises
    EngineUnavailableError as `check` does."""
    name, url = check(engine, context.concurrency)
    return OpenAIEndpoint(name, url, api_key=context.api_key) if url else FACTORIES[name](name, context)
