"""A target worker around a scripted engine and a toy tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from actors.drafting.interface import TargetIdentity
from actors.models.load import LoadedModel
from actors.models.runner import ModelInfo
from actors.sampling.params import SamplingParams
from actors.target_worker.generation import StreamInterval
from actors.target_worker.messages import (
    GenerationChunk,
    GenerationRequest,
)
from actors.target_worker.output import merge
from actors.target_worker.worker import TargetWorker
from actors.text.tokenizer import TextTokenizer
from cluster.config import EngineConfig, ModelConfig
from tests.scripted_engine import Script, ScriptedEngine, rounds

CONTEXT = 64


class FakeRunner:
    row_invariant = True
    supports_trees = False
    num_blocks = 8

    def __init__(self, info: ModelInfo) -> None:
        self.info = info


class FakeSource:
    def __init__(self, drafters: tuple[str, ...]) -> None:
        self.drafters = drafters


class Rig:
    """A worker around a scripted engine."""

    def __init__(
        self,
        folder: Path,
        script: Script,
        step_s: float = 0.0,
        interval_ms: float = 0.0,
        drafters: tuple[str, ...] = ("prompt_lookup", "nested"),
        **engine: Any,
    ) -> None:
        self.fake = ScriptedEngine(script, step_s)
        self.identity: TargetIdentity | None = None
        vocab = TextTokenizer(folder).vocab_size
        info = ModelInfo(
            "toy", "ToyForCausalLM", 2, 8, 2, 1, 4, vocab, CONTEXT, torch.float32, torch.device("cpu")
        )

        def load(source: str, **options: Any) -> LoadedModel:
            assert (source, options["dtype"], options["max_model_len"]) == ("toy-source", "float32", CONTEXT)
            return LoadedModel(FakeRunner(info), folder, info, "torch", "hash")  # type: ignore[arg-type]

        def source(target: TargetIdentity) -> Any:
            self.identity = target
            return FakeSource(drafters)

        self.worker = TargetWorker(
            ModelConfig(
                name="toy",
                source="toy-source",
                dtype="float32",
                max_model_len=CONTEXT,
                engine=EngineConfig(**{"max_num_seqs": 4, "max_queued": 2} | engine),
            ),
            build_draft_source=source,
            build_engine=lambda loaded, config, draft_source, compiler: self.fake,
            load=load,
            exits=(2, 4),
            replica_id="r0",
            stream_interval=StreamInterval(interval_ms),
        )

    async def __aenter__(self) -> Rig:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.fake.gate.set()
        assert await self.worker.close(5.0)

    async def chunks(self, request: GenerationRequest) -> list[GenerationChunk]:
        async with asyncio.timeout(10):
            return [chunk async for chunk in self.worker.generate(request)]

    async def choice(self, request: GenerationRequest) -> GenerationChunk:
        """All chunks of the only choice, as one."""
        whole: GenerationChunk | None = None
        for chunk in await self.chunks(request):
            whole = merge(whole, chunk)
        assert whole is not None
        return whole


def ask(prompt: str = "the end", max_tokens: int | None = 16, **fields: Any) -> GenerationRequest:
    sampling = fields.pop("sampling", SamplingParams(seed=7))
    return GenerationRequest("req", sampling, prompt_text=prompt, max_tokens=max_tokens, **fields)


def scripted(blocks: Sequence[Sequence[int]], **options: Any) -> Script:
    return lambda request: rounds(request, blocks, **options)


def blocks_of(ids: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Cut ids into rounds of these sizes; the rest one by one."""
    cuts = [0]
    for size in [*sizes, *[1] * len(ids)]:
        if cuts[-1] < len(ids):
            cuts.append(min(cuts[-1] + size, len(ids)))
    return [list(ids[a:b]) for a, b in pairwise(cuts)]
