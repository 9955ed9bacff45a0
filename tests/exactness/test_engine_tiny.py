"""The engine on a tiny random model: speculation, batching, caching and preemption never change ids."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from actors.drafting.interface import DraftQuery, SessionDraft, SessionOpen
from actors.drafting.nested import NestedDrafter
from actors.drafting.prompt_lookup import PromptLookupDrafter
from actors.drafting.token_recycling import TokenRecyclingDrafter
from actors.engine.messages import EngineRequest
from actors.engine.speculator import DraftTimeouts
from actors.engine.torch_engine import TorchEngine
from actors.models.runner import RaggedBatch
from actors.models.torch_llama import TorchLlamaRunner
from actors.sampling.grammar import GrammarError
from actors.sampling.noise import derive_key
from actors.sampling.params import (
    GrammarSpec,
    ParameterError,
    SamplingParams,
    SpeculationParams,
    VerificationName,
)
from actors.sampling.pipeline import SequenceSampler
from tests.draft_rig import SlowDrafter
from tests.exactness.harness import AnyText, Result, make_engine, run, tiny_llama, torch_runner

OFF = SpeculationParams(enabled=False)
TINY_LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"), layers=TINY_LAYERS)


@pytest.fixture(scope="module")
def runner(folder: Path) -> TorchLlamaRunner:
    return torch_runner(folder)


@pytest.fixture(scope="module")
def engine(folder: Path, runner: TorchLlamaRunner) -> Iterator[TorchEngine]:
    nested = NestedDrafter(torch_runner(folder), exits=(1, 2, TINY_LAYERS))
    built = make_engine(runner, [PromptLookupDrafter(), TokenRecyclingDrafter(), nested])
    yield built
    built.close()


def prompts(count: int, seed: int = 1) -> list[tuple[int, ...]]:
    """Half repetitive, half random."""
    rng = random.Random(seed)
    made: list[tuple[int, ...]] = []
    for index in range(count):
        if index % 2:
            made.append(tuple(rng.randrange(320) for _ in range(rng.randint(1, 70))))
        else:
            made.append(tuple(rng.randrange(320) for _ in range(rng.randint(2, 5))) * rng.randint(2, 12))
    return made


def request(
    name: str, prompt: tuple[int, ...], speculation: SpeculationParams = OFF, **sampling: object
) -> EngineRequest:
    fields = {"max_tokens": 40, "temperature": 0.0, **sampling}
    return EngineRequest(name, prompt, SamplingParams(**fields), speculation)  # type: ignore[arg-type]


def forced(length: int, drafter: str, exit_depth: int | None = None) -> SpeculationParams:
    return SpeculationParams(max_draft_tokens=length, force=True, drafter=drafter, exit_depth=exit_depth)


DRAFTERS = [("prompt_lookup", None), ("token_recycling", None), ("nested", 1), ("nested", TINY_LAYERS)]


def solo(engine: TorchEngine, one: EngineRequest) -> Result:
    return run(engine, [dataclasses.replace(one, speculation=OFF)])[one.request_id]


def test_greedy_equals_transformers(engine: TorchEngine, folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    for index, prompt in enumerate(prompts(8)):
        ours = solo(engine, request(f"hf-{index}", prompt)).token_ids
        with torch.inference_mode():
            theirs = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=40,
                do_sample=False,
            )
        assert ours == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("drafter", "exit_depth"), DRAFTERS)
@pytest.mark.parametrize("length", [1, 3, 8])
def test_forced_drafts_change_nothing(
    engine: TorchEngine, drafter: str, exit_depth: int | None, length: int
) -> None:
    batch = [request(f"b{i}", p, forced(length, drafter, exit_depth)) for i, p in enumerate(prompts(16))]
    together = run(engine, batch, arrive_every=2)
    for one in batch:
        alone = run(engine, [one])[one.request_id]
        plain = solo(engine, one)
        assert together[one.request_id].token_ids == plain.token_ids
        assert alone.token_ids == plain.token_ids
    assert sum(r.drafted for r in together.values()) > 0


SAMPLED = [
    {"temperature": 0.7, "seed": 1},
    {"temperature": 1.0, "seed": -5, "top_p": 0.8},
    {"temperature": 2.0, "seed": 2**62, "top_k": 20},
    {"temperature": 1.0, "seed": 9, "min_p": 0.05},
    {
        "temperature": 0.9,
        "seed": 4,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.2,
    },
    {"temperature": 1.0, "seed": 7, "logit_bias": {3: 5.0, 9: -100.0}},
    {
        "temperature": 1.0,
        "seed": 8,
        "allowed_token_ids": tuple(range(0, 320, 20)),
        "bad_sequences": ((40, 60),),
    },
    {
        "temperature": 0.0,
        "repetition_penalty": 1.3,
        "min_tokens": 10,
        "stop_token_ids": tuple(range(0, 320, 2)),
    },
]


@pytest.mark.parametrize(("drafter", "exit_depth"), DRAFTERS)
def test_sampled_drafts_change_nothing(engine: TorchEngine, drafter: str, exit_depth: int | None) -> None:
    batch = [
        request(f"s{i}-{j}", prompt, forced(3, drafter, exit_depth), **params)
        for j, params in enumerate(SAMPLED)
        for i, prompt in enumerate(prompts(2, seed=j))
    ]
    together = run(engine, batch, arrive_every=1)
    for one in batch:
        assert together[one.request_id].token_ids == solo(engine, one).token_ids, one.sampling


def occurs(sequence: tuple[int, ...], tokens: list[int]) -> bool:
    return sequence in {tuple(tokens[at : at + len(sequence)]) for at in range(len(tokens))}


@pytest.mark.parametrize("rule", ["coupled", "leviathan"])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 3}], ids=str)
def test_bad_sequences_are_never_completed(
    engine: TorchEngine, sampling: dict[str, object], rule: VerificationName
) -> None:
    """Those of the plain answer are forbidden one after the other; the deepest exit goes on drafting them."""
    plain = request("b", prompts(2)[1], **sampling)
    bad: tuple[tuple[int, ...], ...] = ()
    drafted = dataclasses.replace(forced(4, "nested", TINY_LAYERS), verification=rule)
    for length in (3, 1, 2, 2):
        free = solo(engine, plain).token_ids
        assert not any(occurs(sequence, free) for sequence in bad)
        bad = (*bad, tuple(free[9 : 9 + length]))
        plain = dataclasses.replace(plain, sampling=dataclasses.replace(plain.sampling, bad_sequences=bad))
    expected = solo(engine, plain).token_ids
    result = run(engine, [dataclasses.replace(plain, speculation=drafted)])["b"]
    assert 0 < result.accepted < result.drafted
    assert not any(occurs(sequence, result.token_ids) for sequence in bad)
    if rule == "coupled" or plain.sampling.greedy:
        assert result.token_ids == expected
    assert len(result.token_ids) == len(expected)


@pytest.mark.parametrize("length", [1, 3, 5])
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.8, "top_p": 0.9, "top_k": 40}]
)
def test_a_draft_equal_to_the_target_is_always_right(
    engine: TorchEngine, length: int, sampling: dict[str, object]
) -> None:
    one = request("full", prompts(1)[0], forced(length, "nested", TINY_LAYERS), max_tokens=220, **sampling)
    result = run(engine, [one])["full"]
    assert len(result.token_ids) == 220
    assert result.drafted > 100
    assert result.accepted == result.drafted


def test_choices_differ_and_each_equals_its_solo_run(engine: TorchEngine) -> None:
    choices = [
        dataclasses.replace(
            request(f"n{c}", prompts(1)[0], forced(3, "nested", 2), temperature=1.0, seed=11), choice=c
        )
        for c in range(3)
    ]
    together = run(engine, choices)
    assert len({tuple(r.token_ids) for r in together.values()}) == 3
    for one in choices:
        assert together[one.request_id].token_ids == solo(engine, one).token_ids


def test_a_request_resumes_with_the_same_ids(engine: TorchEngine) -> None:
    one = request("r", prompts(2)[1], temperature=1.0, seed=5, presence_penalty=0.5)
    whole = solo(engine, one).token_ids
    resumed = dataclasses.replace(one, output_ids_so_far=tuple(whole[:17]))
    assert solo(engine, resumed).token_ids == whole[17:]


def test_warm_prefix_cache_equals_cold(engine: TorchEngine) -> None:
    engine.reset_shared_state()
    one = request("p", tuple(range(100)), forced(3, "token_recycling"))
    cold = run(engine, [one])["p"]
    warm = run(engine, [one])["p"]
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 96)
    assert cold.token_ids == warm.token_ids


def test_a_reset_of_caches_keeps_what_was_measured(engine: TorchEngine) -> None:
    one = request("k", tuple(range(100)), forced(3, "nested", 2))
    run(engine, [one])
    measured = engine.stats().drafting.acceptance_by_exit
    assert measured
    scopes: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._speculator.source, "reset", scopes.append)
        engine.reset_shared_state("caches")
        engine.reset_shared_state("all")
    assert scopes == ["caches", "all"]
    run(engine, [one])
    engine.reset_shared_state("caches")
    assert engine.stats().drafting.acceptance_by_exit == measured
    assert run(engine, [one])["k"].cached_tokens == 0
    engine.reset_shared_state()
    assert engine.stats().drafting.acceptance_by_exit == {}


def test_kv_for_three_serves_sixteen(runner: TorchLlamaRunner, folder: Path) -> None:
    small = make_engine(torch_runner(folder, num_blocks=12, max_model_len=128), [PromptLookupDrafter()])
    batch = [request(f"k{i}", p[:60], max_tokens=60) for i, p in enumerate(prompts(16, seed=3))]
    batch = [dataclasses.replace(one, speculation=SpeculationParams()) for one in batch]
    together = run(small, batch)
    assert small.stats().preemptions > 0
    assert small.stats().kv_blocks_used == 0
    for one in batch:
        assert together[one.request_id].token_ids == solo(small, one).token_ids


def test_limits_of_the_context(folder: Path) -> None:
    limit = 64
    engine = make_engine(torch_runner(folder, num_blocks=8, max_model_len=limit), [PromptLookupDrafter()])
    for length, expected in ((limit - 1, 1), (limit - 8, 8)):
        one = request("edge", (1, 2) * (length // 2) + (1,) * (length % 2), forced(8, "prompt_lookup"))
        result = run(engine, [one])["edge"]
        assert (len(result.token_ids), result.finish_reason) == (expected, "length")
        assert result.token_ids == solo(engine, one).token_ids
    with pytest.raises(ParameterError, match="prompt: has 64 tokens"):
        engine.add(request("over", (1,) * limit))
    assert not engine.has_work()


def test_ends_inside_an_accepted_block(engine: TorchEngine) -> None:
    prompt = prompts(1)[0]
    plain = solo(engine, request("e", prompt, max_tokens=40)).token_ids
    for place in (1, 2, 5, 11):
        stop = plain[place]
        at = plain.index(stop)
        for sampling in ({"stop_token_ids": (stop,)}, {"eos_token_ids": (stop,)}):
            one = request(
                "e", prompt, forced(5, "nested", TINY_LAYERS), max_tokens=40, logprobs=0, **sampling
            )
            result = run(engine, [one])["e"]
            assert result.token_ids == plain[: at + 1]
            assert result.finish_reason == "stop"
            assert [entry.token_id for entry in result.logprobs] == result.token_ids
        ignoring = request(
            "e", prompt, forced(5, "nested", TINY_LAYERS), eos_token_ids=(stop,), ignore_eos=True
        )
        assert run(engine, [ignoring])["e"].token_ids == plain
    for count in (1, 2, 4):
        one = request("e", prompt, forced(5, "nested", TINY_LAYERS), max_tokens=count)
        result = run(engine, [one])["e"]
        assert (result.token_ids, result.finish_reason) == (plain[:count], "length")


def test_logprobs_do_not_depend_on_speculation(engine: TorchEngine) -> None:
    one = request("l", prompts(1)[0], forced(4, "nested", 2), temperature=1.0, seed=2, logprobs=3, top_k=5)
    with_drafts, without = run(engine, [one])["l"], solo(engine, one)
    assert [e.token_id for e in with_drafts.logprobs] == with_drafts.token_ids
    for a, b in zip(with_drafts.logprobs, without.logprobs, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
        assert [t for t, _ in a.top] == [t for t, _ in b.top]


def test_prompt_logprobs_are_those_of_transformers(folder: Path) -> None:
    prompt = tuple(i * 37 % 320 for i in range(100))
    with torch.inference_mode():
        logits = LlamaForCausalLM.from_pretrained(folder).eval()(torch.tensor([prompt])).logits[0]
    expected = logits.log_softmax(dim=-1)
    engine = make_engine(torch_runner(folder), max_batched_tokens=32)
    one = request("p", prompt, prompt_logprobs=2, max_tokens=1)
    for _ in range(2):  # a cache that knows the prompt changes nothing
        first, *rest = run(engine, [one])["p"].prompt_logprobs or ()
        assert first is None
        assert [entry and entry.token_id for entry in rest] == list(prompt[1:])
        for row, entry in zip(expected[:-1], rest, strict=True):
            assert entry is not None
            best, ids = row.topk(2)
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
            assert [token for token, _ in entry.top] == ids.tolist()
            assert [value for _, value in entry.top] == pytest.approx(best.tolist(), abs=1e-4)
    assert run(engine, [request("p", prompt, max_tokens=1)])["p"].cached_tokens == 96
    engine.close()


def test_greedy_decoding_meets_the_conditions_of_a_request(engine: TorchEngine) -> None:
    prompt = prompts(1)[0]
    best = solo(engine, request("g", prompt)).token_ids[0]
    assert solo(engine, request("g", prompt, logit_bias={best: -100.0})).token_ids[0] != best
    stops = tuple(range(0, 320, 2))
    lengths = [
        len(solo(engine, request("g", prompt, stop_token_ids=stops, min_tokens=least)).token_ids)
        for least in (0, 20)
    ]
    assert lengths[0] < 20 < lengths[1]


def test_abort_frees_everything_at_once(engine: TorchEngine) -> None:
    engine.reset_shared_state()
    for index, prompt in enumerate(prompts(20)):
        engine.add(request(f"a{index}", prompt, SpeculationParams(), max_tokens=200))
    for _ in range(6):
        engine.step()
    for index in range(20):
        engine.abort(f"a{index}")
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    assert not engine.has_work()


def test_leviathan_as_the_default_gets_what_drafts_were_drawn_from(
    folder: Path, runner: TorchLlamaRunner
) -> None:
    """A draft that is the target itself is nearly always accepted, if its distribution comes along."""
    nested = NestedDrafter(torch_runner(folder), exits=(TINY_LAYERS,))
    engine = make_engine(runner, [nested], speculation={"verification": "leviathan"})
    one = request("v", prompts(1)[0], forced(3, "nested", TINY_LAYERS), temperature=1.0, top_k=40, seed=8)
    result = run(engine, [one])["v"]
    engine.close()
    assert result.drafted >= 20
    assert result.accepted >= 0.9 * result.drafted


def test_leviathan_is_reproducible_and_serves_every_drafter(engine: TorchEngine) -> None:
    for drafter, depth in DRAFTERS:
        speculation = dataclasses.replace(forced(3, drafter, depth), verification="leviathan")
        one = request("v", prompts(1)[0], speculation, temperature=1.0, seed=8)
        first, second = run(engine, [one])["v"], run(engine, [one])["v"]
        assert len(first.token_ids) == 40
        assert drafter == "token_recycling" or first.token_ids == second.token_ids
    greedy = request(
        "v", prompts(1)[0], dataclasses.replace(forced(3, "nested", 1), verification="leviathan")
    )
    assert run(engine, [greedy])["v"].token_ids == solo(engine, greedy).token_ids


def test_measuring_again_while_idle_touches_nobodys_blocks(runner: TorchLlamaRunner) -> None:
    engine = make_engine(runner, [PromptLookupDrafter()])
    one = request("a", tuple(range(100)))
    cold = run(engine, [one])["a"].token_ids
    rounds = 0
    while engine.idle(lambda: False):
        rounds += 1
        assert rounds < 100
    assert rounds > 10
    stats = engine.stats()
    assert stats.kv_blocks_used == 0
    again = run(engine, [one])["a"]
    assert again.cached_tokens > 0
    assert again.token_ids == cold
    engine.close()


def test_a_request_comes_between_two_passes_of_what_is_measured_while_idle(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row counts, which are compared with each other, are measured from the first on after it."""
    runner = torch_runner(folder)
    engine = make_engine(runner, [PromptLookupDrafter()])
    rows: list[int] = []
    forward = runner.forward

    def counted(batch: RaggedBatch) -> torch.Tensor:
        rows.append(batch.num_tokens)
        return forward(batch)

    monkeypatch.setattr(runner, "forward", counted)
    while rows[-1:] != [2]:  # the second of the first turn
        assert engine.idle(lambda: rows[-1:] == [2])
    rows.clear()
    engine.add(request("a", (1, 2, 3)))
    engine.abort("a")
    assert engine.idle(lambda: False)
    assert rows == [1, 2, 3, 5, 9, 17, 33]
    engine.close()


class _Foreign:
    """Guesses what a target of a larger vocabulary would say."""

    name = "token_recycling"
    learns = False

    def open(self, session: SessionOpen) -> None: ...
    def close(self, session_id: int) -> None: ...
    def reset(self, scope: str = "all") -> None: ...
    def commit(self, session_id: int, new_tokens: object, candidates: object = ()) -> None: ...

    def propose(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
        return [SessionDraft(q.session_id, q.epoch, (7, 200_000, -5), drafter=self.name) for q in queries]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}])
@pytest.mark.parametrize("tree", [False, True])
def test_ids_that_are_none_of_the_targets_are_not_verified(
    runner: TorchLlamaRunner, engine: TorchEngine, sampling: dict[str, object], tree: bool
) -> None:
    foreign = make_engine(runner, [_Foreign()])
    speculation = SpeculationParams(force=True, max_draft_tokens=3, tree=tree)
    one = request("f", prompts(2)[1], speculation, **sampling)
    result = run(foreign, [one])["f"]
    foreign.close()
    assert result.token_ids == solo(engine, one).token_ids
    assert 0 < result.drafted <= len(result.rounds)


def test_a_request_that_cannot_be_sampled_for_ends_alone(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = SequenceSampler.scores

    def failing(self: SequenceSampler, *args: object, **options: object) -> torch.Tensor:
        if len(self.output_ids) == 5 and self.key == derive_key(13, 0):
            raise IndexError("nothing is left")
        return scores(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(SequenceSampler, "scores", failing)
    requests = [
        request(name, prompts(3)[1], temperature=1.0, seed=seed) for name, seed in (("a", 13), ("b", 5))
    ]
    results = run(engine, requests)
    assert (len(results["a"].token_ids), results["a"].finish_reason) == (5, "error")
    assert results["b"].token_ids == solo(engine, requests[1]).token_ids
    assert engine.stats().kv_blocks_used == 0


class _Breaking(AnyText):
    """Runs into a limit when `where` is called for the fifth time, and is of no more use then."""

    def __init__(self, where: str) -> None:
        super().__init__(320)
        self._where, self._left = where, 5

    def _meet(self, where: str) -> None:
        self._left -= where == self._where
        if self._left <= 0:
            raise GrammarError("a limit was met")

    def admissible(self, drafts: Sequence[int]) -> int:
        self._meet("admissible")
        return super().admissible(drafts)

    def mask(self) -> torch.Tensor:
        self._meet("mask")
        return super().mask()

    def advance(self, token: int) -> None:
        self._meet("advance")


@pytest.mark.parametrize(
    ("where", "drafts"), [("admissible", 3), ("mask", 0), ("advance", 0), ("advance", 3)]
)
def test_a_request_whose_grammar_fails_ends_alone(folder: Path, where: str, drafts: int) -> None:
    engine = make_engine(torch_runner(folder), [SlowDrafter()], compile_grammar=lambda _: _Breaking(where))
    speculation = SpeculationParams(force=True, max_draft_tokens=drafts)
    free = request("b", prompts(3)[2], speculation, temperature=1.0, seed=5)
    bound = request("a", prompts(3)[1], speculation, grammar=GrammarSpec("json_object"))
    results = run(engine, [bound, free])
    plain = solo(engine, dataclasses.replace(bound, sampling=SamplingParams(max_tokens=40, temperature=0.0)))
    ended = results["a"]
    assert (ended.finish_reason, ended.error) == ("error", "a limit was met")
    assert ended.token_ids == plain.token_ids[: len(ended.token_ids)]
    assert len(ended.token_ids) < 40
    assert results["b"].token_ids == solo(engine, free).token_ids
    assert engine.stats().kv_blocks_used == 0
    engine.close()


def test_a_model_may_draft_only_for_requests_that_force_it(folder: Path) -> None:
    engine = make_engine(torch_runner(folder), [SlowDrafter()], speculation={"enabled": False})
    free, forcing = SpeculationParams(), SpeculationParams(force=True, max_draft_tokens=3)
    assert run(engine, [request("m", (5, 6, 7), free)])["m"].drafted == 0
    assert engine.stats().drafting.asked_tokens == 0
    assert run(engine, [request("m", (5, 6, 7), forcing)])["m"].drafted > 0
    engine.close()


def test_a_model_sets_the_length_and_form_of_drafts(folder: Path) -> None:
    drafter, settings = SlowDrafter(), {"max_draft_tokens": 2, "tree": False}
    engine = make_engine(torch_runner(folder), [drafter], speculation=settings)
    result = run(engine, [request("m", (5, 6, 7), SpeculationParams())])["m"]
    assert max(query.budget for query in drafter.queries) == 2
    assert max(r.drafted for r in result.rounds) <= 2
    assert not any(query.tree for query in drafter.queries)
    engine.close()


def test_a_model_may_keep_no_prefixes_and_sets_how_long_drafts_are_waited_for(
    folder: Path, engine: TorchEngine
) -> None:
    assert engine._speculator._timeouts == DraftTimeouts(0.015, 2.0)
    waits = {"draft_timeout_ms": 7.0, "forced_draft_timeout_ms": 900.0}
    other = make_engine(torch_runner(folder), speculation=waits, prefix_caching=False)
    assert other._speculator._timeouts == DraftTimeouts(0.007, 0.9)
    for _ in range(2):
        assert run(other, [request("m", tuple(range(100)))])["m"].cached_tokens == 0
    other.close()


def test_a_context_shorter_than_what_is_profiled(folder: Path) -> None:
    short = torch_runner(folder, max_model_len=48)
    engine = make_engine(short, [PromptLookupDrafter()])
    one = request("s", (1, 2, 3) * 5, forced(3, "prompt_lookup"), max_tokens=20)
    assert run(engine, [one])["s"].token_ids == solo(engine, one).token_ids
    engine.close()
