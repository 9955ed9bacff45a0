"""The embedded model with its real weights: Hugging Face `generate`, speculation on and off, in batches.

float32 must agree, except where the two best logits are closer than `TIE`; every such place is listed in the
test's output. With and without drafts, a row-invariant runner must agree there too. bfloat16 is compared with
itself, and what differs is counted. `-s` shows the reports.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.drafting.nested import NestedDrafter
from actors.drafting.prompt_lookup import PromptLookupDrafter
from actors.drafting.token_recycling import TokenRecyclingDrafter
from actors.engine.messages import EngineRequest
from actors.engine.torch_engine import TorchEngine
from actors.models.load import LoadedModel, load_runner
from actors.models.runner import LayeredRunner
from actors.sampling.grammar import GrammarCompiler
from actors.sampling.params import GrammarSpec, SamplingParams, SpeculationParams
from actors.text.tokenizer import TextTokenizer
from cluster.config import EMBEDDED_MODEL
from tests import prompts
from tests.exactness.harness import Result, make_engine, run

pytestmark = pytest.mark.slow
TIE = 1e-4
TOKENS = 24
EARLY_EXIT = 4
OFF = SpeculationParams(enabled=False)
Forced = tuple[str, int | None]
DRAFTERS: list[Forced] = [("prompt_lookup", None), ("token_recycling", None), ("nested", EARLY_EXIT)]


@cache
def loaded(dtype: str) -> LoadedModel:
    return load_runner(
        EMBEDDED_MODEL,
        dtype=dtype,
        backend="auto",
        device="cpu",
        kv_blocks=400,
        kv_memory_gib=1.0,  # type: ignore[arg-type]
        max_model_len=1024,
        threads=0,
    )


@cache
def tokenizer() -> TextTokenizer:
    return TextTokenizer(loaded("float32").tokenizer_folder)


def _engine(dtype: str, depth: int) -> TorchEngine:
    layers = load_runner(
        EMBEDDED_MODEL,
        dtype=dtype,
        backend="auto",
        device="cpu",
        kv_blocks=400,
        kv_memory_gib=1.0,  # type: ignore[arg-type]
        max_model_len=1024,
        threads=0,
        num_layers=depth,
    ).runner
    exits = tuple(sorted({EARLY_EXIT, depth}))
    nested = NestedDrafter(layers, exits)  # type: ignore[arg-type]
    compiler = GrammarCompiler(tokenizer().hf, loaded(dtype).info.vocab_size, tokenizer().eos_token_ids)
    runner: LayeredRunner = loaded(dtype).runner  # type: ignore[assignment]
    return make_engine(
        runner, [PromptLookupDrafter(), TokenRecyclingDrafter(), nested], compile_grammar=compiler.compile
    )


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    built = _engine("float32", depth=30)
    yield built
    built.close()


@pytest.fixture(scope="module")
def encoded() -> list[tuple[int, ...]]:
    return [tuple(tokenizer().encode(text, True)) for text in prompts.ALL]


def requests(
    encoded: list[tuple[int, ...]], speculation: SpeculationParams = OFF, **sampling: object
) -> list[EngineRequest]:
    fields = {"max_tokens": TOKENS, "temperature": 0.0, **sampling}
    return [
        EngineRequest(f"p{i}", ids, SamplingParams(**fields), speculation)  # type: ignore[arg-type]
        for i, ids in enumerate(encoded)
    ]


def forced(length: int, drafter: Forced) -> SpeculationParams:
    return SpeculationParams(max_draft_tokens=length, force=True, drafter=drafter[0], exit_depth=drafter[1])


@pytest.fixture(scope="module")
def plain(engine: TorchEngine, encoded: list[tuple[int, ...]]) -> dict[str, Result]:
    """Each prompt alone, without speculation: what everything else is compared with."""
    return {one.request_id: run(engine, [one])[one.request_id] for one in requests(encoded)}


def ties(engine: TorchEngine, prompt: tuple[int, ...], ours: list[int], theirs: list[int]) -> str:
    """Empty when the ids are equal. Fails unless the first difference is a tie of the two best logits."""
    if ours == theirs:
        return ""
    place = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    probe = EngineRequest(
        "probe", (*prompt, *ours[:place]), SamplingParams(max_tokens=1, temperature=0, logprobs=2), OFF
    )
    best = run(engine, [probe])["probe"].logprobs[0].top
    gap = best[0][1] - best[1][1]
    assert gap < TIE, f"token {place}: {ours[place]} and {theirs[place]} differ with a gap of {gap:.2e}"
    return f"token {place}: a tie of {best[0][0]} and {best[1][0]} within {gap:.1e}"


def test_greedy_equals_hugging_face(
    engine: TorchEngine, encoded: list[tuple[int, ...]], plain: dict[str, Result]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        loaded("float32").tokenizer_folder, dtype=torch.float32
    ).eval()
    listed = []
    for index, ids in enumerate(encoded):
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids)),
                max_new_tokens=TOKENS,
                min_new_tokens=TOKENS,
                do_sample=False,
                suppress_tokens=None,
            )
        theirs = out[0, len(ids) :].tolist()
        ours = plain[f"p{index}"].token_ids
        if 2 in ours:
            # `min_new_tokens` forbids the end token, ours has none configured: compare up to it.
            ours, theirs = ours[: ours.index(2)], theirs[: ours.index(2)]
        note = ties(engine, ids, ours, theirs)
        if note:
            listed.append(f"prompt {index}, {note}")
    print(f"\n60 prompts against Hugging Face generate, float32: {60 - len(listed)} equal", *listed, sep="\n")


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("length", [1, 3, 8])
def test_forced_drafts_in_batches_of_sixteen(
    engine: TorchEngine,
    encoded: list[tuple[int, ...]],
    plain: dict[str, Result],
    drafter: Forced,
    length: int,
) -> None:
    listed = []
    drafted = accepted = 0
    together = run(engine, requests(encoded, forced(length, drafter)), arrive_every=1)
    for index, ids in enumerate(encoded):
        result = together[f"p{index}"]
        drafted, accepted = drafted + result.drafted, accepted + result.accepted
        note = ties(engine, ids, result.token_ids, plain[f"p{index}"].token_ids)
        if note:
            listed.append(f"prompt {index}, {note}")
    assert drafted > 0
    if loaded("float32").runner.row_invariant:
        assert not listed
    print(
        f"\n{drafter}, length {length}, mixed batch of 16: {60 - len(listed)}/60 equal,",
        f"{accepted}/{drafted} accepted",
        *listed,
        sep="\n",
    )


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_forced_drafts_alone(
    engine: TorchEngine, encoded: list[tuple[int, ...]], plain: dict[str, Result], drafter: Forced
) -> None:
    for length in (1, 3, 8):
        for one in requests(encoded, forced(length, drafter))[length::6]:
            result = run(engine, [one])[one.request_id]
            note = ties(engine, one.prompt_ids, result.token_ids, plain[one.request_id].token_ids)
            assert not (note and loaded("float32").runner.row_invariant), note


SAMPLED: list[dict[str, object]] = [
    {"temperature": 0.7, "seed": 1},
    {"temperature": 1.0, "seed": 2, "top_p": 0.9},
    {"temperature": 2.0, "seed": 3, "top_k": 50},
    {"temperature": 1.0, "seed": 4, "min_p": 0.05},
    {
        "temperature": 0.8,
        "seed": -5,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.15,
    },
    {"temperature": 1.0, "seed": 6, "logit_bias": {11: 3.0, 28: -100.0}},
]


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_sampled_ids_do_not_depend_on_speculation_or_company(
    engine: TorchEngine, encoded: list[tuple[int, ...]], drafter: Forced
) -> None:
    mixed: list[EngineRequest] = []
    for index, params in enumerate(SAMPLED):
        for one in requests(encoded[index * 3 : index * 3 + 2], forced(3, drafter), **params):
            for choice in range(3):
                name = f"{one.request_id}-{index}-{choice}"
                mixed.append(dataclasses.replace(one, request_id=name, choice=choice))
    together = run(engine, mixed, arrive_every=1)
    for one in mixed:
        alone = run(engine, [dataclasses.replace(one, speculation=OFF)])[one.request_id]
        assert together[one.request_id].token_ids == alone.token_ids, one.sampling


@pytest.mark.parametrize("length", [1, 3, 5])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}])
def test_a_draft_equal_to_the_target(
    engine: TorchEngine, encoded: list[tuple[int, ...]], length: int, sampling: dict[str, object]
) -> None:
    one = requests(encoded[1:2], forced(length, ("nested", 30)), max_tokens=220, **sampling)[0]
    result = run(engine, [one])[one.request_id]
    assert len(result.token_ids) == 220
    assert result.accepted == result.drafted > 100


def test_a_grammar_ends_inside_an_accepted_block(engine: TorchEngine) -> None:
    ids = tuple(tokenizer().encode("A JSON object:", True))
    grammar = GrammarSpec(
        "json_schema",
        '{"type":"object","properties":{"ok":{"type":"boolean"}},"required":["ok"],'
        '"additionalProperties":false}',
    )
    eos = tuple(tokenizer().eos_token_ids)
    results = [
        run(
            engine,
            requests([ids], speculation, max_tokens=40, grammar=grammar, eos_token_ids=eos, logprobs=0),
        )["p0"]
        for speculation in (OFF, forced(5, ("nested", 30)), forced(3, ("token_recycling", None)))
    ]
    for result in results:
        assert result.finish_reason == "stop"
        assert result.token_ids == results[0].token_ids
        assert [e.token_id for e in result.logprobs] == result.token_ids


def test_bfloat16_counts_what_differs(encoded: list[tuple[int, ...]]) -> None:
    engine = _engine("bfloat16", depth=EARLY_EXIT)
    chosen = encoded[::3]
    alone = {one.request_id: run(engine, [one])[one.request_id] for one in requests(chosen)}
    report, differing = [], 0
    for drafter in DRAFTERS:
        together = run(engine, requests(chosen, forced(3, drafter)), arrive_every=1)
        differ = sum(together[name].token_ids != alone[name].token_ids for name in alone)
        differing += differ
        report.append(f"{drafter[0]}: {differ} of {len(alone)} outputs differ")
    engine.close()
    print("\nbfloat16, on against off", *report, sep="\n")
    if loaded("bfloat16").runner.row_invariant:
        assert differing == 0, report
