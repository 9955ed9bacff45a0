"""A target worker: one model with its engine, tokenizer and grammar compiler, behind asyncio methods."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from actors.drafting.assignment import DraftAssignment
from actors.drafting.interface import NESTED, DraftSource, TargetIdentity
from actors.engine.async_engine import AsyncEngine
from actors.engine.interface import TargetEngine
from actors.engine.messages import EngineStats, ResetScope
from actors.models.cores import cores_of
from actors.models.load import LoadedModel, load_runner
from actors.models.runner import LayeredRunner
from actors.sampling.grammar import GrammarCompiler
from actors.sampling.params import ParameterError
from actors.target_worker.generation import GenerationService, StreamInterval
from actors.target_worker.messages import GenerationChunk, GenerationRequest, TargetInfo, TargetState
from actors.target_worker.prepare import ModelLimits
from actors.target_worker.startup import StartupClock
from actors.text.chat_template import render_async
from actors.text.messages import ChatMessage
from actors.text.tokenizer import INLINE_CHARS, TextTokenizer
from actors.text.tokenizer_file import pack

if TYPE_CHECKING:
    from cluster.config import ModelConfig


class DraftSourceFactory(Protocol):
    def __call__(self, target: TargetIdentity) -> DraftSource: ...


class EngineFactory(Protocol):
    def __call__(
        self,
        loaded: LoadedModel,
        config: ModelConfig,
        draft_source: DraftSource,
        grammar_compiler: GrammarCompiler,
    ) -> TargetEngine: ...


class TargetWorker:
    """Loads the model in the constructor (blocking, seconds to minutes) and serves it until closed.

    The engine thread starts with the first asynchronous call, on whose event loop all later calls must run.
    The engine owns the draft source and closes it.

    Args:
        config: the served model.
        build_draft_source: connects to whoever drafts for this target.
        build_engine: puts the engine together.
        load: reads the weights; takes the arguments of `load_runner`.
        drafters, exits: what requests may pin; by default all drafters of the source, and no exits.
        replica_id: names this worker in `state`.
        stream_interval: how far apart chunks of one choice are at least.
        clock: of this start, when it began before the constructor.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        build_draft_source: DraftSourceFactory,
        build_engine: EngineFactory,
        load: Callable[..., LoadedModel] = load_runner,
        drafters: Collection[str] | None = None,
        exits: Collection[int] = (),
        replica_id: str = "",
        stream_interval: StreamInterval,
        clock: StartupClock | None = None,
    ) -> None:
        clock = clock or StartupClock()
        loaded = load(
            config.source,
            dtype=config.dtype,
            backend=config.backend,
            device=config.torch_device,
            kv_blocks=config.engine.kv_blocks,
            kv_memory_gib=config.engine.kv_memory_gib,
            max_model_len=config.max_model_len,
            threads=config.engine.compute_threads,
            adapter=config.adapter,
        )
        clock.mark("weights")
        model = loaded.info
        self._replica_id = replica_id
        self._tokenizer = TextTokenizer(loaded.tokenizer_folder)
        source = build_draft_source(
            TargetIdentity(
                replica_id,
                config.name,
                model.vocab_size,
                self._tokenizer.vocab_hash,
                partial(pack, self._tokenizer),
                loaded.source_hash if isinstance(loaded.runner, LayeredRunner) else "",
                cores_of(model.device.type),
                config.speculation.weight,
            )
        )
        compiler = GrammarCompiler(self._tokenizer.hf, model.vocab_size, self._tokenizer.eos_token_ids)
        names = tuple(source.drafters if drafters is None else drafters)
        self._limits = ModelLimits(
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            drafters=names,
            exits=tuple(exits) if NESTED in names else (),
        )
        clock.mark("tokenizer and drafts")
        engine = build_engine(loaded, config, source, compiler)
        clock.mark("engine costs")
        self._startup = clock.seconds
        self._engine = AsyncEngine(
            engine,
            max_running=config.engine.max_num_seqs,
            max_queued=config.engine.max_queued,
        )
        self._generation = GenerationService(
            self._tokenizer, self._engine, self._limits, stream_interval, compiler
        )
        self._info = TargetInfo(
            id=config.name,
            source=config.source if config.adapter is None else f"{config.source} + {config.adapter}",
            max_model_len=model.max_model_len,
            dtype=model.dtype_name,
            architecture=model.architecture,
            vocab_size=model.vocab_size,
            backend=loaded.backend,
            drafters=tuple(self._limits.drafters),
            row_invariant=loaded.runner.row_invariant,
        )

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        """See `GenerationService.generate`."""
        return self._generation.generate(request)

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Ids of `text`. Raises ParameterError("prompt") when it is not valid Unicode."""
        ids, _ = await self._tokenizer.encode_async(text, add_special_tokens)
        return tuple(ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`, special tokens included. Raises ParameterError("tokens") for unknown ids."""
        for token_id in token_ids:
            if not 0 <= token_id < self._limits.vocab_size:
                raise ParameterError("tokens", f"token id {token_id} is not in this model's vocabulary")
        if len(token_ids) <= INLINE_CHARS:
            return self._tokenizer.decode(token_ids)
        return await asyncio.to_thread(self._tokenizer.decode, token_ids)

    async def render(
        self, messages: Sequence[ChatMessage], add_generation_prompt: bool = True
    ) -> tuple[int, ...]:
        """Ids of the conversation under the model's chat template. Raises ParameterError("messages")."""
        return tuple(await render_async(self._tokenizer, messages, add_generation_prompt))

    def info(self) -> TargetInfo:
        return self._info

    async def state(self) -> TargetState:
        """A fresh snapshot. Raises TimeoutError when the engine does not answer."""
        stats = await self._engine.stats()
        engine: dict[str, Any] = dataclasses.asdict(stats)
        workers = stats.draft_source.get("workers", ())
        return TargetState(
            info=self._info,
            replica_id=self._replica_id,
            engine=engine,
            draft_workers=tuple(w for w in workers if isinstance(w, dict))
            if isinstance(workers, list | tuple)
            else (),
            startup=self._startup,
        )

    async def stats(self) -> EngineStats:
        """The engine's own snapshot. Raises TimeoutError or EngineUnavailable."""
        return await self._engine.stats()

    def assign(self, assignment: DraftAssignment) -> None:
        """Draft as assigned from the next round on. Raises EngineUnavailable."""
        self._engine.assign(assignment)

    async def reset(self, scope: ResetScope = "all") -> None:
        """Drop what requests share."""
        await self._engine.reset(scope)

    def check_health(self) -> None:
        """Raises RuntimeError when the engine thread is dead or hangs."""
        if not self._engine.healthy():
            raise RuntimeError("the engine is dead or hangs")

    async def drain(self, timeout_s: float) -> bool:
        """Accept nothing more, wait for what runs; False when some of it had to be aborted."""
        return await self._engine.drain(timeout_s)

    async def close(self, timeout_s: float = 10.0) -> bool:
        """Stop the engine. False when it did not stop in time."""
        return await self._engine.close(timeout_s)
