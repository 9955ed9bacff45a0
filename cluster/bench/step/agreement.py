"""How far a precision is from float32: teacher forced over float32's own greedy answers.

Each model reads prompt and answer in one pass. Counted are the positions at which its best token is that of
float32, and the Kullback-Leibler divergence from float32's distribution to its own, in nats, on average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from actors.models.load import LoadedModel, load_runner
from actors.models.native_llama import NativeLlamaRunner
from actors.models.runner import ModelRunner, RaggedBatch
from cluster.bench.config import StepSettings
from cluster.bench.prompts import PROMPTS
from cluster.bench.rendering import PromptRenderer
from cluster.config import DTypeName

KV_BLOCKS = 64
"""Of 32 tokens: room for the longest built-in prompt and its answer."""


@dataclass(frozen=True, slots=True)
class Agreement:
    dtype: DTypeName
    tokens: int
    same: int
    divergence: float


def measure_agreement(
    settings: StepSettings,
    advance: Callable[[], None] = lambda: None,
    say: Callable[[str], None] | None = None,
) -> list[Agreement]:
    """One entry a precision of the settings but float32. `advance` is called `len(PROMPTS)` times for each
    precision, float32 included."""
    with _runner("float32", settings, say) as loaded:
        prompts = rendered_prompts(loaded.tokenizer_folder)
        references: list[tuple[tuple[int, ...], Tensor]] = []
        for prompt in prompts:
            answer = greedy(loaded.runner, prompt, settings.agreement_tokens)
            ids = (*prompt, *answer[:-1])
            references.append((ids, row_logits(loaded.runner, ids, settings.agreement_tokens)))
            advance()
    found = []
    for dtype in settings.dtypes:
        if dtype == "float32":
            continue
        with _runner(dtype, settings, say) as loaded:
            same, divergence, tokens = 0, 0.0, 0
            for ids, reference in references:
                logits = row_logits(loaded.runner, ids, len(reference))
                same += int((logits.argmax(-1) == reference.argmax(-1)).sum())
                divergence += float(divergences(reference, logits).sum())
                tokens += len(reference)
                advance()
        found.append(Agreement(dtype, tokens, same, divergence / tokens))
    return found


def rendered_prompts(folder: Path) -> list[tuple[int, ...]]:
    renderer = PromptRenderer(folder)
    return [renderer.render((prompt.text,)).ids for prompt in PROMPTS]


def divergences(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || logits) in nats of each row: float64 [N] of float32 [N, V]."""
    expected = reference.double().log_softmax(-1)
    return (expected.exp() * (expected - logits.double().log_softmax(-1))).sum(-1)


def greedy(runner: ModelRunner, prompt: Sequence[int], tokens: int) -> list[int]:
    """So many tokens, whatever they are: after the end of an answer they still are a text that models can
    agree on."""
    ids = list(prompt)
    start = 0
    for _ in range(tokens):
        ids.append(int(runner.forward(RaggedBatch.chain(torch.tensor(ids[start:]), start, 1)).argmax()))
        start = len(ids) - 1
    return ids[len(prompt) :]


def row_logits(runner: ModelRunner, ids: Sequence[int], last: int) -> Tensor:
    """float32 [last, V] of the last positions."""
    return runner.forward(RaggedBatch.chain(torch.tensor(ids), last=last))


@contextmanager
def _runner(
    dtype: DTypeName, settings: StepSettings, say: Callable[[str], None] | None
) -> Iterator[LoadedModel]:
    loaded = load_runner(
        settings.source, dtype=dtype, kv_blocks=KV_BLOCKS, threads=settings.threads, progress=say
    )
    try:
        yield loaded
    finally:
        if isinstance(loaded.runner, NativeLlamaRunner):
            loaded.runner.close()
