"""A target without a model, behind the gateway's `ModelClient`: letters out, everything recorded."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.engine.messages import ResetScope
from actors.target_worker.messages import (
    GenerationChunk,
    GenerationRequest,
    PositionLogprobs,
    RequestError,
    SpeculationStats,
    TargetInfo,
    TargetState,
    TextLogprob,
    Usage,
)
from actors.text.messages import ChatMessage
from cluster.config import GatewayConfig
from cluster.gateway.errors import not_ready
from cluster.gateway.in_flight import InFlight
from cluster.gateway.models import ModelDirectory
from cluster.gateway.routes import Gateway

VOCAB = 1000
MODEL = "org/fake-model"
SPECULATION_FIELDS: dict[str, Any] = {
    "enabled": False,
    "max_draft_tokens": 3,
    "force": True,
    "drafter": "prompt_lookup",
    "exit_depth": 4,
    "verification": "leviathan",
    "tree": True,
}
"""Every field, with a value that is no default."""
SPECULATION = SpeculationStats(2, 4, 2, (0, 2), (("toy", 1, 1), ("nested@4", 3, 1)))


def info(name: str = MODEL) -> TargetInfo:
    return TargetInfo(
        id=name,
        source="fake",
        max_model_len=128,
        dtype="float32",
        architecture="Fake",
        vocab_size=VOCAB,
        backend="fake",
        drafters=("prompt_lookup", "token_recycling"),
    )


def logprob(token_id: int, value: float = -0.5, count: int = 0) -> PositionLogprobs:
    entry = TextLogprob(token_id, value, chr(token_id), chr(token_id).encode())
    top = tuple(TextLogprob(65 + k, value - k, chr(65 + k), bytes([65 + k])) for k in range(count))
    return PositionLogprobs(entry, top, 0)


@dataclass
class FakeTarget:
    """Emits `max_tokens` (at most `length`) tokens, one chunk each; token i of choice c is letter a + c + i.

    `script` replaces the chunks of a request. `hold` makes a stream wait after its first chunk.
    """

    name: str = MODEL
    length: int = 4
    script: Callable[[GenerationRequest], list[GenerationChunk]] | None = None
    hold: asyncio.Event | None = None
    alive: bool = True
    requests: list[GenerationRequest] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    running: int = 0
    cancelled: int = 0
    resets: list[ResetScope] = field(default_factory=list)

    def chunks(self, request: GenerationRequest) -> list[GenerationChunk]:
        if self.script is not None:
            return self.script(request)
        chunks: list[GenerationChunk] = []
        wanted = self.length if request.max_tokens is None else min(self.length, request.max_tokens)
        sampling = request.sampling
        for choice in range(request.n):
            for i in range(max(wanted, 1)):
                token = 97 + choice + i
                last = i == max(wanted, 1) - 1
                chunks.append(
                    GenerationChunk(
                        index=choice,
                        text=("PROMPT" if request.echo and i == 0 else "") + (chr(token) if wanted else ""),
                        token_ids=(token,) if wanted else (),
                        rounds=((1, i % 2),) if wanted else (),
                        logprobs=(logprob(token, count=sampling.logprobs),)
                        if sampling.logprobs is not None and wanted
                        else None,
                        finish_reason="length" if last else None,
                        usage=Usage(0 if choice else 5, wanted, 0 if choice else 2) if last else None,
                        prompt_usage=None if i else Usage(0 if choice else 5, 0, 0 if choice else 2),
                        speculation=SPECULATION if last else None,
                        seed=sampling.seed if i == 0 else None,
                        prompt_token_ids=(80, 82) if request.echo and i == 0 else None,
                        prompt_logprobs=(None, logprob(82, -math.inf))
                        if i == 0 and sampling.prompt_logprobs is not None
                        else None,
                    )
                )
        return chunks

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        self.requests.append(request)
        self.arrived.set()
        self.running += 1
        done = False
        try:
            for number, chunk in enumerate(self.chunks(request)):
                if number and self.hold is not None:
                    await self.hold.wait()
                await asyncio.sleep(0)
                yield chunk
            done = True
        finally:
            self.running -= 1
            self.cancelled += not done

    async def tokenize(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        return ((1,) if add_special_tokens else ()) + tuple(ord(c) % VOCAB for c in text)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(t) for t in token_ids)

    async def render_ids(
        self, messages: Sequence[ChatMessage], add_generation_prompt: bool
    ) -> tuple[int, ...]:
        text = "".join(f"<{m.role}>{m.content}" for m in messages)
        text += "<assistant>" if add_generation_prompt else ""
        return tuple(ord(c) % VOCAB for c in text)

    async def info(self) -> TargetInfo:
        if not self.alive:
            raise not_ready("down")
        return info(self.name)

    async def states(self) -> Sequence[TargetState]:
        drafters = {"toy": {"rounds": 3}}
        engine: dict[str, object] = {
            "running": self.running,
            "waiting": 0,
            "odd": math.nan,
            "drafted_rounds": 3,
            "drafters": drafters,
        }
        return [TargetState(info(self.name), "replica-1", engine), TargetState(info(self.name), "replica-2")]

    async def reset(self, scope: ResetScope) -> None:
        self.resets.append(scope)


class FakeDraftPool:
    async def states(self) -> Sequence[dict[str, object]]:
        return [{"id": "d1", "address": "127.0.0.1:9100", "sessions": 0, "error": None}]


def refuse(kind: str, message: str = "no", param: str | None = None) -> Callable[..., list[GenerationChunk]]:
    """A script whose only chunk is an error."""
    error = RequestError(kind, message, param, retry_after_s=3.2)  # type: ignore[arg-type]
    return lambda request: [GenerationChunk(error=error)]


def gateway(*targets: FakeTarget, **config: object) -> Gateway:
    return Gateway(
        config=GatewayConfig.model_validate(config),
        directory=ModelDirectory({t.name: t for t in targets}),
        draft_pool=FakeDraftPool(),
        in_flight=InFlight(),
    )
