"""A peer behind the benchmark's interface: options, start, requests, and the text of the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from actors.models.convert import model_folder
from actors.models.source import ModelSourceError, ResolvedSource, resolve_source
from actors.models.tokenizer import load_tokenizer
from cluster.bench.engines.interface import BenchRequest, BenchResponse, EngineUnavailableError
from cluster.bench.engines.peer_host import HostError, HostTimeouts, PeerHost
from cluster.bench.peers.environments import python_of
from cluster.config import EMBEDDED_MODEL

HOSTS = Path(__file__).parent.parent / "peers"
MAX_CONCURRENCY = 256
"""Sequences that one context of llama.cpp can have."""
Progress = Callable[[str], None]


class PeerOptions(BaseModel):
    """What peers are started with, equal for all of them where it applies.

    model: as a model's source in the server's configuration. threads: 0 takes the physical cores.
    environments: the folder with the installed peers, None for the user's cache. dtype: of Hugging Face;
    elsewhere the precision is in the name. lookup_tokens and lookup_ngram: prompt lookup, None for the peer's
    own default. assistant: folder of a draft model for hf-assisted and vllm-bf16-draft-model; None takes the
    model's own first `assistant_layers` layers (None: 4 of 5). kv_cache_gib and compiled: of vLLM (compiled:
    torch.compile, which starts a minute slower).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = EMBEDDED_MODEL
    threads: int = Field(0, ge=0)
    max_model_len: int = Field(2048, ge=16)
    max_concurrency: int = Field(16, ge=1, le=MAX_CONCURRENCY)
    environments: Path | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    lookup_tokens: int | None = Field(None, ge=1, le=64)
    lookup_ngram: int | None = Field(None, ge=1, le=16)
    assistant: Path | None = None
    assistant_layers: int | None = Field(None, ge=1)
    kv_cache_gib: float = Field(1.0, gt=0)
    compiled: bool = False
    start_timeout_s: float = Field(600.0, gt=0)
    request_timeout_s: float = Field(600.0, gt=0)


@dataclass(frozen=True, slots=True)
class Launch:
    """How a peer's script is started."""

    script: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    model: Path


class PeerEngine:
    """A `BenchEngine` in a peer's environment. `plan` finds its model and arguments; it may take minutes and
    runs in a thread."""

    def __init__(
        self,
        name: str,
        peer: str,
        options: PeerOptions,
        plan: Callable[[ResolvedSource, Path, Progress], Launch],
        progress: Progress | None = None,
    ) -> None:
        self._name = name
        self._peer = peer
        self._options = options
        self._plan = plan
        self._progress = progress or (lambda message: None)
        self._host: PeerHost | None = None
        self._tokenizer: Any = None
        self._description: dict[str, Any] = {"peer": peer}

    @property
    def name(self) -> str:
        return self._name

    @property
    def pid(self) -> int | None:
        return self._host.pid if self._host is not None else None

    async def start(self) -> None:
        python = python_of(self._peer, self._options.environments)
        try:
            launch = await asyncio.to_thread(self._prepare, python)
        except (ModelSourceError, TimeoutError) as error:
            raise EngineUnavailableError(f"{self._name}: {error}") from error
        timeouts = HostTimeouts(self._options.start_timeout_s, self._options.request_timeout_s)
        command = (str(python), str(HOSTS / launch.script), *launch.arguments)
        host = PeerHost(command, launch.environment, timeouts)
        self._progress(f"starting {self._name}")
        try:
            hello = await host.start()
        except HostError as error:
            raise EngineUnavailableError(f"{self._name}: {error}") from error
        self._host = host
        self._description |= {"versions": hello["versions"], "options": hello["options"]}

    def _prepare(self, python: Path) -> Launch:
        source = resolve_source(self._options.model)
        self._tokenizer = load_tokenizer(model_folder(source, self._progress))
        self._description |= {"source": source.source, "content_hash": source.content_hash}
        return self._plan(source, python, self._progress)

    async def stop(self) -> None:
        host, self._host = self._host, None
        if host is not None:
            await host.stop()

    async def reset(self) -> None:
        if self._host is not None:
            await self._host.reset()

    async def generate(self, request: BenchRequest) -> BenchResponse:
        if self._host is None:
            raise RuntimeError(f"{self._name} is not started")
        response = await self._host.generate(request)
        if response.token_ids is not None:
            response.text = self._tokenizer.decode(response.token_ids, skip_special_tokens=True)
        return response

    def describe(self) -> Mapping[str, Any]:
        return dict(self._description)
