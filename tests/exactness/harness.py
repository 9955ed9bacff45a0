"""Runs requests through a real engine in this process, and compares outputs token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from actors.drafting.interface import Drafter, DraftSource
from actors.drafting.local_source import LocalDraftSource
from actors.drafting.selector import DrafterPool
from actors.engine.build import build_engine
from actors.engine.messages import EngineRequest, FinishReason, RoundReport
from actors.engine.torch_engine import TorchEngine
from actors.models.llama_load import load_llama_weights
from actors.models.runner import LayeredRunner
from actors.models.torch_llama import TorchLlamaRunner
from actors.sampling.grammar import GrammarMatcher
from actors.sampling.params import GrammarSpec, ParameterError
from actors.sampling.results import TokenLogprobs
from cluster.config import EngineConfig, SpeculationConfig

_STEP_LIMIT = 20_000


@dataclass(slots=True)
class Result:
    """Everything one request emitted."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    rounds: list[RoundReport] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    error: str | None = None

    @property
    def drafted(self) -> int:
        return sum(r.drafted for r in self.rounds)

    @property
    def accepted(self) -> int:
        return sum(r.accepted for r in self.rounds)


def tiny_llama(folder: Path, *, seed: int = 0, vocab: int = 320, layers: int = 4, tied: bool = False) -> Path:
    """A small random Llama with grouped queries, saved as a Hugging Face folder."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        # Large enough that outputs vary with the context instead of repeating one token.
        initializer_range=0.3,
        tie_word_embeddings=tied,
        eos_token_id=None,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


def torch_runner(
    folder: Path, num_blocks: int = 256, max_model_len: int | None = None, dtype: torch.dtype = torch.float32
) -> TorchLlamaRunner:
    weights, info = load_llama_weights(folder, dtype, torch.device("cpu"), max_model_len=max_model_len)
    return TorchLlamaRunner(weights, info, num_blocks, threads=1)


def no_grammar(spec: GrammarSpec) -> GrammarMatcher:
    raise ParameterError("response_format", "this engine was built without a tokenizer")


class AnyText(GrammarMatcher):
    """A grammar that allows every token."""

    finished = False

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def admissible(self, drafts: Sequence[int]) -> int:
        return len(drafts)

    def mask(self) -> torch.Tensor:
        return torch.ones(self._vocab_size, dtype=torch.bool)

    def advance(self, token: int) -> None: ...

    def rollback(self, count: int) -> None: ...


def make_engine(
    runner: LayeredRunner,
    drafters: Sequence[Drafter] = (),
    *,
    source: DraftSource | None = None,
    compile_grammar: Callable[[GrammarSpec], GrammarMatcher] = no_grammar,
    speculation: Mapping[str, object] | None = None,
    **engine: object,
) -> TorchEngine:
    """An engine over `runner` with drafters in this process. `engine` overrides EngineConfig fields,
    `speculation` SpeculationConfig fields."""
    return build_engine(
        runner,
        EngineConfig.model_validate(engine),
        SpeculationConfig.model_validate(speculation or {}),
        source or LocalDraftSource(DrafterPool(drafters)),
        compile_grammar,
    )


def run(
    engine: TorchEngine,
    requests: Sequence[EngineRequest],
    *,
    arrive_every: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Result]:
    """Run requests to their end. With `arrive_every` a request joins the batch every so many steps."""
    results = {request.request_id: Result() for request in requests}
    queue = list(requests)
    for step in range(_STEP_LIMIT):
        while queue and (not arrive_every or step % arrive_every == 0):
            engine.add(queue.pop(0))
            if arrive_every:
                break
        if not queue and not engine.has_work():
            return results
        for output in engine.step():
            result = results[output.request_id]
            result.token_ids.extend(output.token_ids)
            result.logprobs.extend(output.logprobs or ())
            if output.round is not None:
                result.rounds.append(output.round)
            result.finish_reason = output.finish_reason
            result.cached_tokens += output.cached_tokens
            result.prompt_logprobs = output.prompt_logprobs or result.prompt_logprobs
            result.error = output.error
        if on_step is not None:
            on_step(step)
    raise AssertionError("the engine did not finish")
