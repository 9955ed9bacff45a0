"""Which models are served, how to reach them, and whether they answer now."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from actors.target_worker.messages import (
    ChatMessage,
    GenerationChunk,
    GenerationRequest,
    TargetInfo,
    TargetState,
)
from cluster.gateway.errors import ApiError, model_not_found, not_ready

PROBE_INTERVAL_S = 1.0
PROBE_TIMEOUT_S = 5.0
PROBE_FAILURES_TO_UNREADY = 2
READY_TIMEOUT_S = 2.0


class ModelClient(Protocol):
    """One served model, however it is reached. Calls raise `ApiError` and nothing else on purpose."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """An async generator; closing it cancels the request at the worker."""
        ...

    async def tokenize(self, text: str, add_special_tokens: bool) -> tuple[int, ...]: ...

    async def detokenize(self, token_ids: Sequence[int]) -> str: ...

    async def render_ids(
        self, messages: Sequence[ChatMessage], add_generation_prompt: bool
    ) -> tuple[int, ...]:
        """Token ids of the conversation under the model's chat template."""
        ...

    async def info(self) -> TargetInfo: ...

    async def states(self) -> Sequence[TargetState]:
        """One snapshot a replica, all replicas."""
        ...

    async def reset(self) -> None:
        """Drop shared caches in every replica."""
        ...


class DraftPoolView(Protocol):
    """What `/state` shows of the draft workers."""

    async def states(self) -> Sequence[Mapping[str, object]]: ...


@dataclass
class ServedModel:
    """A model and what the last probes said about it."""

    name: str
    client: ModelClient
    created: int = field(default_factory=lambda: int(time.time()))
    last_info: TargetInfo | None = None
    failures: int = 0

    @property
    def ready(self) -> bool:
        return self.last_info is not None and self.failures < PROBE_FAILURES_TO_UNREADY

    async def probe(self, timeout_s: float) -> bool:
        """Ask the model for its info; remembers the answer. Never raises, except on cancellation."""
        try:
            async with asyncio.timeout(timeout_s):
                self.last_info = await self.client.info()
        except (ApiError, TimeoutError):
            self.failures += 1
            return False
        self.failures = 0
        return True


class ModelDirectory:
    """All served models. `start` keeps probing them, so that requests to a dead model are refused at once
    instead of waiting for it."""

    def __init__(self, clients: Mapping[str, ModelClient]) -> None:
        self._models = {name: ServedModel(name, client) for name, client in clients.items()}
        self._prober: asyncio.Task[None] | None = None

    def all(self) -> list[ServedModel]:
        return list(self._models.values())

    def names(self) -> list[str]:
        return list(self._models)

    def find(self, name: str) -> ServedModel:
        """Raises 404 for a model that is not served; says nothing about readiness."""
        model = self._models.get(name)
        if model is None:
            raise model_not_found(name)
        return model

    async def ready_model(self, name: str) -> tuple[ServedModel, TargetInfo]:
        """Raises 404, or 503 when the model does not answer."""
        model = self.find(name)
        if not model.ready:
            await model.probe(READY_TIMEOUT_S)
        if model.last_info is None or not model.ready:
            raise not_ready(f"the model `{name}` is not ready", retry_after_s=2.0)
        return model, model.last_info

    def only_name(self) -> str | None:
        """The name to assume where `model` may be left out."""
        return next(iter(self._models)) if len(self._models) == 1 else None

    async def unready(self) -> list[str]:
        """Probe every model now; the names of those that do not answer."""
        models = self.all()
        answers = await asyncio.gather(*(model.probe(READY_TIMEOUT_S) for model in models))
        return [model.name for model, ok in zip(models, answers, strict=True) if not ok]

    def start(self) -> None:
        """Probe in the background. Needs a running event loop; a second call does nothing."""
        if self._prober is None:
            self._prober = asyncio.get_running_loop().create_task(self._probe_forever())

    async def close(self) -> None:
        if self._prober is not None:
            self._prober.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._prober
            self._prober = None

    async def _probe_forever(self) -> None:
        while True:
            await asyncio.gather(*(model.probe(PROBE_TIMEOUT_S) for model in self.all()))
            await asyncio.sleep(PROBE_INTERVAL_S)
