"""Real peers, each where its environment is installed (`s2d bench install PEER`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path

import pytest
import torch

from actors.models.convert import model_folder
from actors.models.source import ModelSourceError, ResolvedSource, resolve_source
from actors.models.tokenizer import load_tokenizer
from cluster.bench.engines.interface import BenchEngine, BenchRequest, EngineUnavailableError
from cluster.bench.engines.peers import PEERS, PeerOptions
from cluster.bench.engines.registry import plain_of
from cluster.bench.peers.environments import ENVIRONMENTS, python_of
from cluster.bench.prompts import PROMPTS
from cluster.config import EMBEDDED_MODEL

pytestmark = pytest.mark.slow
NEW_TOKENS = 32
EXACT_TOKENS = 6
"""Of 32, as far as rounded weights must agree with float32 in the median prompt: they part at near ties."""


def embedded() -> ResolvedSource:
    try:
        return resolve_source(EMBEDDED_MODEL)
    except ModelSourceError as error:
        pytest.skip(str(error))


@cache
def requests() -> tuple[BenchRequest, ...]:
    tokenizer = load_tokenizer(model_folder(embedded()))
    found = []
    for index, prompt in enumerate(PROMPTS[:6]):
        messages = [{"role": "user", "content": prompt.text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        found.append(BenchRequest(str(index), ids, text, NEW_TOKENS, ignore_eos=True))
    return tuple(found)


@cache
def reference() -> tuple[tuple[int, ...], ...]:
    """Greedy continuations of Hugging Face in float32, in this process."""
    from transformers import AutoModelForCausalLM

    folder: Path = model_folder(embedded())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    answers = []
    for request in requests():
        ids = torch.tensor([request.prompt_ids])
        output = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        answers.append(tuple(output[0, ids.shape[1] :].tolist()))
    return tuple(answers)


@asynccontextmanager
async def peer(name: str, options: PeerOptions) -> AsyncIterator[BenchEngine]:
    environment = next(e for e in ENVIRONMENTS if name.startswith(e))
    try:
        python_of(environment, options.environments)
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    engine = PEERS[name](options)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def common_prefix(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    pairs = zip(one, other, strict=True)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), len(one))


@pytest.mark.parametrize("name", ["hf", "hf-prompt-lookup", "hf-assisted"])
async def test_hugging_face_in_float32_gives_the_same_ids(name: str) -> None:
    async with peer(name, PeerOptions(dtype="float32", max_concurrency=4)) as engine:
        responses = await asyncio.gather(*(engine.generate(request) for request in requests()))
    for response, wanted in zip(responses, reference(), strict=True):
        assert response.error is None
        assert response.token_ids == wanted
        assert response.text
        assert (response.speculation is not None) == (name != "hf")
    if name != "hf":
        assert sum(r.speculation.accepted for r in responses if r.speculation is not None) > 0


@pytest.mark.parametrize(
    "name",
    ["llama.cpp-bf16", "llama.cpp-f16", "llama.cpp-f16-prompt-lookup", "llama.cpp-q8_0", "vllm-bf16",
     "vllm-bf16-ngram", "vllm-bf16-suffix", "vllm-bf16-draft-model"],
)  # fmt: skip
async def test_rounded_weights_differ_late_or_never(name: str) -> None:
    async with peer(name, PeerOptions(max_concurrency=4)) as engine:
        responses = await asyncio.gather(*(engine.generate(request) for request in requests()))
        assert engine.describe()["versions"]
        await engine.reset()
        alone = await engine.generate(requests()[0])
        await engine.reset()
    assert [response.error for response in responses] == [None] * len(responses)
    same = sorted(common_prefix(r.token_ids or (), w) for r, w in zip(responses, reference(), strict=True))
    assert same[len(same) // 2] >= EXACT_TOKENS, same
    assert alone.error is None
    assert (alone.speculation is None) == (plain_of(name) is None)
    if alone.speculation is not None:
        # Every round emits its accepted drafts and one token; the last may have been cut at the limit.
        rounds, accepted = alone.speculation.rounds, alone.speculation.accepted
        assert NEW_TOKENS <= rounds + accepted <= NEW_TOKENS + 10
        assert alone.speculation.drafted >= accepted


@pytest.mark.parametrize("name", ["hf", "llama.cpp-q8_0-prompt-lookup", "vllm-bf16"])
async def test_cancel_reset_and_end_of_text(name: str) -> None:
    async with peer(name, PeerOptions(max_concurrency=2)) as engine:
        first = requests()[0]
        long = BenchRequest("long", first.prompt_ids, "", 1500, ignore_eos=True)
        task = asyncio.create_task(engine.generate(long))
        await asyncio.sleep(1.0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await engine.reset()
        tokenizer = load_tokenizer(model_folder(embedded()))
        text = "<|im_start|>user\nSay only the word yes.<|im_end|>\n<|im_start|>assistant\n"
        short = BenchRequest("short", tuple(tokenizer(text)["input_ids"]), text, 400)
        response = await engine.generate(short)
    assert response.error is None
    assert response.finish_reason == "stop"
    assert response.token_ids is not None
    assert response.token_ids[-1] == tokenizer.eos_token_id
