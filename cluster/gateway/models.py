"""Which models are served, how to reach them, and whether they answer now."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

from actors.engine.messages import ResetScope
from actors.target_worker.messages import GenerationChunk, GenerationRequest, TargetInfo, TargetState
from actors.text.messages import ChatMessage
from cluster.config import ModelConfig
from cluster.gateway.errors import ApiError, model_not_found, not_ready, overloaded
from cluster.gateway.in_flight import InFlight

logger = logging.getLogger(__name__)
PROBE_INTERVAL_S = 1.0
PROBE_TIMEOUT_S = 5.0
DISCOVERY_INTERVAL_S = 5.0
MOST_WAITING = 256
"""Requests that wait for one model to wake."""
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

    async def reset(self, scope: ResetScope) -> None:
        """Drop what requests share in every replica."""
        ...


class DraftPoolView(Protocol):
    """What `/state` shows of the draft workers."""

    async def states(self) -> Sequence[Mapping[str, object]]: ...


ModelState = Literal["ready", "starting", "asleep", "failed"]
"""asleep: scaled to zero, and woken by a request."""


@dataclass(frozen=True, slots=True)
class Presence:
    """What Ray Serve says of a model's deployment. `message` explains a failure. `deployed_at`: Unix time in
    seconds of the last deployment, None until all workers are of it."""

    state: ModelState
    message: str = ""
    deployed_at: float | None = None


class ModelDiscovery(Protocol):
    """Models whose presence Ray Serve tells: loaded while the cluster runs, or scaled to zero at times. They
    are asked once when they have become ready or were deployed anew, and not probed: calls would keep them
    awake."""

    async def presences(self) -> Mapping[str, Presence]:
        """By name. Raises `ApiError` while Serve does not answer."""
        ...

    def client(self, name: str) -> ModelClient: ...


class ModelLoader(Protocol):
    """Loads and unloads models. Both return once that has begun, and raise `ApiError`."""

    async def load(self, model: ModelConfig) -> None: ...

    async def unload(self, name: str) -> bool:
        """False where no such model was loaded."""
        ...


@dataclass
class ServedModel:
    """A model and what the last probes, or Ray Serve, said about it. `loaded`: while the cluster ran.
    `asked`: for its info, since Ray Serve last said that it had become ready. `deployed_at`: the last known,
    as in `Presence`. `in_flight`: the generation calls to it that run here."""

    name: str
    client: ModelClient
    created: int = field(default_factory=lambda: int(time.time()))
    last_info: TargetInfo | None = None
    failures: int = 0
    presence: Presence | None = None
    loaded: bool = False
    asked: bool = False
    deployed_at: float | None = None
    in_flight: InFlight = field(init=False)

    def __post_init__(self) -> None:
        self.in_flight = InFlight(partial(model_not_found, self.name))

    @property
    def state(self) -> ModelState:
        if self.presence is not None:
            return self.presence.state
        ready = self.last_info is not None and self.failures < PROBE_FAILURES_TO_UNREADY
        return "ready" if ready else "starting" if self.last_info is None else "failed"

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    async def probe(self, timeout_s: float) -> bool:
        """Ask the model for its info; remembers the answer. Never raises, except on cancellation."""
        try:
            async with asyncio.timeout(timeout_s):
                self.last_info = await self.client.info()
        except Exception as error:
            if not isinstance(error, ApiError | TimeoutError):
                logger.error("asking the model `%s` for its info failed", self.name, exc_info=error)
            self.failures += 1
            return False
        self.failures = 0
        return True


@dataclass
class _Waking:
    """A call that wakes a model, and how many requests wait for it."""

    call: asyncio.Task[bool]
    waiting: int = 0


class ModelDirectory:
    """All served models. `start` keeps probing them, so that requests to a dead model are refused at once
    instead of waiting for it.

    Args:
        clients: models that are always there.
        discovery: tells of further models, and of those of `clients` that may sleep.
        wake_timeout_s: longest wait of a request for a model that sleeps.
    """

    def __init__(
        self,
        clients: Mapping[str, ModelClient],
        discovery: ModelDiscovery | None = None,
        wake_timeout_s: float = 120.0,
    ) -> None:
        self._models = {name: ServedModel(name, client) for name, client in clients.items()}
        self._discovery = discovery
        self._wake_timeout_s = wake_timeout_s
        self._prober: asyncio.Task[None] | None = None
        self._refreshed_at = float("-inf")
        self._looks = 0
        self._outdated = 0  # this look at Ray Serve and all before it
        self._waking: dict[str, _Waking] = {}
        self._retired: set[str] = set()

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

    def taken(self, name: str) -> bool:
        """Whether a model of this name is served, or was and is not gone yet."""
        return name in self._models or name in self._retired

    def retire(self, name: str) -> None:
        """Serve a loaded model no longer, whatever Ray Serve says of it, until `forget` is called. What runs
        goes on."""
        if name in self._models and self._models[name].loaded:
            del self._models[name]
            self._retired.add(name)

    def forget(self, name: str) -> None:
        """Serve a loaded model no longer, unless Ray Serve says from now on that it is there."""
        self._retired.discard(name)
        if name in self._models and self._models[name].loaded:
            del self._models[name]
        self._outdated = self._looks  # a look that has begun may still have seen it

    async def ready_model(self, name: str) -> tuple[ServedModel, TargetInfo]:
        """Wakes a model that sleeps. Raises 404, or 503 when the model does not answer."""
        if name not in self._models and time.monotonic() - self._refreshed_at >= PROBE_INTERVAL_S:
            await self.refresh()  # it may have been loaded a moment ago
        model = self.find(name)
        if model.presence is not None:
            if time.monotonic() - self._refreshed_at >= PROBE_INTERVAL_S:
                await self.refresh()  # it may have fallen asleep a moment ago
            return model, await self._awake(model, model.presence)
        if not model.ready:
            await model.probe(READY_TIMEOUT_S)
        if model.last_info is None or not model.ready:
            raise not_ready(f"the model `{name}` is not ready", retry_after_s=2.0)
        return model, model.last_info

    async def _awake(self, model: ServedModel, presence: Presence) -> TargetInfo:
        if presence.state in ("starting", "failed"):
            why = f": {presence.message}" if presence.message else ""
            raise not_ready(
                f"the model `{model.name}` is not ready ({presence.state}{why})", retry_after_s=5.0
            )
        if presence.state == "ready" and model.last_info is not None:
            return model.last_info
        if not await self._wake(model) or model.last_info is None:
            raise not_ready(
                f"the model `{model.name}` was asleep and did not wake within {self._wake_timeout_s:g} s",
                retry_after_s=10.0,
            )
        model.presence, model.asked = Presence("ready"), True
        return model.last_info

    async def _wake(self, model: ServedModel) -> bool:
        """One call for all who wait: it waits in Serve's queue until a worker is there, and its waiting makes
        Serve start one. Raises 429 when too many wait."""
        waking = self._waking.get(model.name)
        if waking is None:
            waking = self._waking[model.name] = _Waking(
                asyncio.get_running_loop().create_task(model.probe(self._wake_timeout_s))
            )
            waking.call.add_done_callback(lambda _: self._waking.pop(model.name, None))
        if waking.waiting >= MOST_WAITING:
            raise overloaded(f"too many requests wait for the model `{model.name}` to wake", 10.0)
        waking.waiting += 1
        try:
            return await asyncio.shield(waking.call)
        finally:
            waking.waiting -= 1

    def only_name(self) -> str | None:
        """The name to assume where `model` may be left out."""
        return next(iter(self._models)) if len(self._models) == 1 else None

    async def unready(self) -> list[str]:
        """The names of the configured models that do not answer; they are asked now. One that sleeps would.
        Loaded models do not count: one that starts or fails must not take the others out of service."""
        if self._refreshed_at == float("-inf"):
            await self.refresh()  # a probe would wake what sleeps
        models = [model for model in self.all() if not model.loaded]
        answers = await asyncio.gather(*(self._answers(model) for model in models))
        return [model.name for model, ok in zip(models, answers, strict=True) if not ok]

    @staticmethod
    async def _answers(model: ServedModel) -> bool:
        if model.presence is None:
            return await model.probe(READY_TIMEOUT_S)
        return model.presence.state in ("ready", "asleep")

    def start(self) -> None:
        """Probe in the background. Needs a running event loop; a second call does nothing."""
        if self._prober is None:
            self._prober = asyncio.get_running_loop().create_task(self._probe_forever())

    async def close(self) -> None:
        for waking in [*self._waking.values()]:
            waking.call.cancel()
        if self._prober is not None:
            self._prober.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._prober
            self._prober = None

    @property
    def _changing(self) -> bool:
        """Whether a model is about to change its state by itself."""
        return any(m.presence is not None and m.presence.state == "starting" for m in self.all())

    async def refresh(self) -> None:
        """Ask Ray Serve what there is. What it does not say stays as it was."""
        if self._discovery is None:
            return
        self._refreshed_at = time.monotonic()
        self._looks += 1
        look = self._looks
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                found = await self._discovery.presences()
        except (ApiError, TimeoutError) as error:
            logger.warning("Ray Serve does not say which models there are: %s", str(error) or "timed out")
            return
        if look <= self._outdated:  # a model was forgotten meanwhile, or a later look came first
            return
        self._outdated = look
        for name, presence in found.items():
            if name in self._retired:
                continue
            if name not in self._models:
                self._models[name] = ServedModel(name, self._discovery.client(name), loaded=True)
            model = self._models[name]
            if presence.state != "ready":
                model.asked = False
            if presence.state in ("starting", "failed"):  # what comes next may say something else
                model.last_info = None
            before, model.deployed_at = model.deployed_at, presence.deployed_at or model.deployed_at
            if before not in (None, model.deployed_at):  # changed, one worker after the other
                model.last_info, model.asked = None, False
            model.presence = presence
        for name in [n for n, m in self._models.items() if m.loaded and n not in found]:
            del self._models[name]

    async def _probe_forever(self) -> None:
        while True:
            try:
                await self._probe_once()
            except Exception:  # without a next time, nothing would become ready again
                logger.exception("probing the models failed")
            await asyncio.sleep(PROBE_INTERVAL_S)

    async def _probe_once(self) -> None:
        if time.monotonic() - self._refreshed_at >= DISCOVERY_INTERVAL_S or self._changing:
            await self.refresh()
        probed = [model for model in self.all() if model.presence is None]
        for model in [m for m in self.all() if m.presence is not None and m.ready and not m.asked]:
            model.asked = True
            probed.append(model)
        # Serve also passes on a CancelledError of a worker, which must not end this task.
        await asyncio.gather(*(model.probe(PROBE_TIMEOUT_S) for model in probed), return_exceptions=True)
