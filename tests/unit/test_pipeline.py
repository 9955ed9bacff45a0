"""The processing of scores: against a plain reference, row by row, and at every boundary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.engine.messages import EngineRequest
from actors.sampling.grammar import GrammarCompiler, GrammarError
from actors.sampling.logprobs import token_logprobs
from actors.sampling.noise import DRAFT, derive_key, uniform
from actors.sampling.params import (
    REPETITION_PENALTIES,
    GrammarSpec,
    ParameterError,
    SamplingParams,
    SpeculationParams,
)
from actors.sampling.pipeline import SequenceSampler
from actors.sampling.truncation import keep_at_least, survival_threshold, surviving_ids
from actors.verification.registry import get_rule
from tests.toy import toy_tokenizer

PROMPT = (3, 4, 4, 5)


def sampler(
    vocab_size: int = 16,
    *,
    prompt: tuple[int, ...] = PROMPT,
    so_far: tuple[int, ...] = (),
    choice: int = 0,
    speculation: SpeculationParams | None = None,
    **params: Any,
) -> SequenceSampler:
    request = EngineRequest(
        "r",
        prompt,
        SamplingParams(**params),
        speculation or SpeculationParams(),
        choice=choice,
        output_ids_so_far=so_far,
    )
    return SequenceSampler(request, vocab_size, None)


def random_logits(rows: int, vocab_size: int, seed: int = 0, scale: float = 4.0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def reference(
    row: Sequence[float], sampling: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> list[float]:
    """Scores as a loop over tokens in float64; the ranks of equal scores are not told apart."""
    z = [float(value) for value in row]
    allowed = set(range(len(z)))
    bad = {s[-1] for s in sampling.bad_sequences if list(s[:-1]) == list(output)[len(output) - len(s) + 1 :]}
    for narrower in (set(sampling.allowed_token_ids) or allowed, allowed - bad):
        allowed = allowed & narrower or allowed
    z = [value if token in allowed else -math.inf for token, value in enumerate(z)]
    for token, bias in sampling.logit_bias.items():
        z[token] += bias
    if len(output) < sampling.min_tokens and allowed - sampling.stop_ids:
        for token in sampling.stop_ids:
            z[token] = -math.inf
    for token in range(len(z)):
        count = list(output).count(token)
        if count or token in prompt:
            z[token] = (
                z[token] / sampling.repetition_penalty
                if z[token] > 0
                else z[token] * sampling.repetition_penalty
            )
        z[token] -= sampling.presence_penalty * (count > 0) + sampling.frequency_penalty * count
    if sampling.greedy:
        return z
    z = [value / sampling.temperature for value in z]

    def laws() -> list[float]:
        weights = [math.exp(value - max(z)) for value in z]
        return [weight / sum(weights) for weight in weights]

    def cut(keep: float) -> None:
        z[:] = [value if value >= keep else -math.inf for value in z]

    p = laws()
    cut(
        min(
            value
            for value, chance in zip(z, p, strict=True)
            if chance >= sampling.min_p * max(p) * (1 - 1e-12)
        )
    )
    if sampling.top_k:
        cut(sorted(z, reverse=True)[: sampling.top_k][-1])
    if sampling.top_p == 1.0:
        return z
    p, mass = laws(), 0.0
    for value, chance in sorted(zip(z, p, strict=True), reverse=True):
        mass += chance
        if mass >= sampling.top_p:
            cut(value)
            break
    return z


PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.0]),
        "top_p": st.sampled_from([0.05, 0.5, 0.9, 0.99, 1.0]),
        "top_k": st.sampled_from([0, 1, 3, 10, 100]),
        "min_p": st.sampled_from([0.0, 0.01, 0.2, 1.0]),
        "logit_bias": st.dictionaries(
            st.integers(0, 15), st.sampled_from([-100.0, -1.5, 2.0, 100.0]), max_size=3
        ),
        "allowed_token_ids": st.sampled_from([(), (2, 9), (1, 2, 5, 7, 9, 11)]),
        "bad_sequences": st.sampled_from([(), ((5,),), ((2,), (9,)), ((7, 5), (5, 5, 2), (11,))]),
        "presence_penalty": st.sampled_from([0.0, 0.7, -1.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.4, -0.3]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
        "min_tokens": st.integers(0, 5),
        "stop_token_ids": st.sampled_from([(), (2,), (2, 9)]),
        "eos_token_ids": st.sampled_from([(), (1,)]),
        "ignore_eos": st.booleans(),
    }
)


@given(
    params=PARAMS,
    seed=st.integers(0, 10**6),
    so_far=st.lists(st.integers(0, 15), max_size=4),
    drafts=st.lists(st.integers(0, 15), max_size=4),
)
@settings(max_examples=150, deadline=None)
def test_scores_equal_the_reference(
    params: dict[str, Any], seed: int, so_far: list[int], drafts: list[int]
) -> None:
    logits = random_logits(len(drafts) + 1, 16, seed)
    before = logits.clone()
    subject = sampler(so_far=tuple(so_far), **params)
    scores = subject.scores(logits, drafts)
    assert torch.equal(logits, before)
    assert scores.dtype == torch.float32
    sampling = SamplingParams(**params)
    for j, row in enumerate(scores):
        expected = torch.tensor(reference(logits[j].tolist(), sampling, PROMPT, [*so_far, *drafts[:j]]))
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-4)
        assert bool((row > -math.inf).any())


@given(params=PARAMS, seed=st.integers(0, 10**6), drafts=st.lists(st.integers(0, 15), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_a_block_has_the_bits_of_plain_steps(params: dict[str, Any], seed: int, drafts: list[int]) -> None:
    logits = random_logits(len(drafts) + 1, 16, seed)
    block = sampler(**params).scores(logits, drafts)
    stepwise = sampler(**params)
    for j in range(len(drafts) + 1):
        assert torch.equal(block[j], stepwise.scores(logits[j : j + 1].clone(), [])[0])
        stepwise.commit(drafts[j : j + 1])
    resumed = sampler(so_far=tuple(drafts), **params)
    assert torch.equal(resumed.scores(logits[-1:], [])[0], block[-1])


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7},
        {"top_p": 0.9},
        {"top_p": 0.999, "temperature": 2.0},
        {"top_k": 50, "top_p": 0.9},
        {"min_p": 0.02, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    ],
    ids=str,
)
def test_bits_of_a_row_do_not_depend_on_the_block_in_a_large_vocabulary(params: dict[str, Any]) -> None:
    vocab_size, drafts = 49_153, [7, 8, 9, 10]
    logits = random_logits(5, vocab_size, 3)
    block = sampler(vocab_size, **params).scores(logits, drafts)
    for j in range(5):
        alone = sampler(vocab_size, so_far=tuple(drafts[:j]), **params)
        assert torch.equal(alone.scores(logits[j : j + 1].clone(), [])[0], block[j])


def test_scores_read_views_of_a_larger_batch() -> None:
    logits = random_logits(9, 16)
    assert torch.equal(
        sampler(top_k=4).scores(logits[3:5], [2]), sampler(top_k=4).scores(logits[3:5].clone(), [2])
    )
    with pytest.raises(ValueError, match="logits must be"):
        sampler().scores(logits, [1])
    with pytest.raises(ValueError, match="logits must be"):
        sampler().scores(random_logits(1, 15), [])


class TestTruncation:
    def survivors(self, row: Tensor, **params: Any) -> list[int]:
        kept = row.clone()
        keep_at_least(kept, survival_threshold(row, **params))
        found: list[int] = surviving_ids(kept).tolist()
        assert torch.equal(kept[found], row[found])
        return found

    def test_ties_at_the_boundary_survive_together(self) -> None:
        row = torch.tensor([1.0, 2.0, 1.0, 1.0, -3.0])
        assert self.survivors(row, top_k=2) == [0, 1, 2, 3]
        assert self.survivors(row, top_p=0.55) == [0, 1, 2, 3]
        assert self.survivors(row, top_k=1) == [1]

    @pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
    def test_the_best_always_survives(self, params: dict[str, Any]) -> None:
        row = torch.tensor([-1000.0, -999.0, -2000.0])
        assert self.survivors(row, **params) == [1]

    def test_zero_and_negative_scores_at_the_boundary(self) -> None:
        assert self.survivors(torch.tensor([0.0, 1.0, -0.0, -1e-3]), top_k=2) == [0, 1, 2]
        assert self.survivors(torch.tensor([-1.0, -2.0, -3.0]), top_k=2) == [0, 1]

    def test_top_p_works_on_what_top_k_left(self) -> None:
        row = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
        # After top_k=2 the law is (4/7, 3/7): the best alone has mass 0.57.
        assert self.survivors(row, top_p=0.55) == [0, 1]
        assert self.survivors(row, top_p=0.55, top_k=2) == [0]

    def test_masked_tokens_stay_masked(self) -> None:
        row = torch.tensor([-math.inf, 1.0, -math.inf, 0.0])
        assert self.survivors(row, top_k=3) == [1, 3]
        assert self.survivors(row, top_p=0.999) == [1, 3]
        assert self.survivors(row, min_p=1e-6, top_k=4, top_p=0.99999) == [1, 3]
        assert survival_threshold(torch.full((4,), -math.inf), top_k=2, top_p=0.5) == -math.inf

    @pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 3.0, 10.0])
    @pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999, 0.9999999])
    def test_nucleus_of_a_large_vocabulary_equals_a_full_sort(self, scale: float, top_p: float) -> None:
        row = random_logits(1, 20_000, 1, scale)[0]
        p = torch.softmax(row.double(), 0)
        ordered, order = p.sort(descending=True)
        size = int((ordered.cumsum(0) < top_p).sum()) + 1
        expected = (row >= row[order[min(size, row.numel()) - 1]]).nonzero().squeeze(1).tolist()
        found = self.survivors(row, top_p=top_p)
        # The reference sums in another order: at a mass of exactly top_p it may differ by one token.
        assert abs(len(found) - len(expected)) <= (1 if scale else 0)


class TestStops:
    def test_min_tokens_counts_the_drafts_before_the_row(self) -> None:
        subject = sampler(min_tokens=3, so_far=(7,), stop_token_ids=(2,), eos_token_ids=(1,), temperature=0.0)
        scores = subject.scores(torch.zeros(4, 16), [6, 6, 6])
        assert [bool(torch.isinf(row[[1, 2]]).all()) for row in scores] == [True, True, False, False]
        assert not bool(torch.isinf(scores[:, [0, 3]]).any())

    def test_an_ignored_eos_is_an_ordinary_token(self) -> None:
        subject = sampler(min_tokens=3, eos_token_ids=(1,), ignore_eos=True, temperature=0.0)
        assert not bool(torch.isinf(subject.scores(torch.zeros(1, 16), [])).any())
        assert subject.admissible([5, 1, 6]) == 3

    def test_min_tokens_never_leaves_nothing(self) -> None:
        subject = sampler(4, prompt=(0,), min_tokens=3, stop_token_ids=(0, 1, 2, 3))
        assert not bool(torch.isinf(subject.scores(torch.zeros(1, 4), [])).any())

    def test_a_draft_that_stops_is_the_last(self) -> None:
        subject = sampler(stop_token_ids=(2,), eos_token_ids=(1,))
        assert subject.admissible([5, 2, 6]) == 2
        assert subject.admissible([1, 1]) == 1
        assert subject.admissible([5, 6]) == 2
        assert subject.admissible([5, 16, 6]) == 1
        assert subject.admissible([-1]) == 0
        assert subject.admissible([]) == 0

    def test_model_end_ids_beyond_the_vocabulary_are_harmless(self) -> None:
        subject = sampler(min_tokens=3, eos_token_ids=(1, 400), temperature=0.0)
        assert torch.isinf(subject.scores(torch.zeros(1, 16), [])[0]).nonzero().flatten().tolist() == [1]


def test_greedy_ignores_temperature_and_truncation_but_not_penalties() -> None:
    logits = random_logits(1, 16)
    plain = sampler(temperature=0.0, top_k=1, top_p=0.1, min_p=1.0).scores(logits, [])
    assert torch.equal(plain, logits)
    best = int(logits.argmax())
    biased = sampler(temperature=0.0, logit_bias={best: -100.0}).scores(logits, [])
    assert int(biased.argmax()) != best


PLAIN_GREEDY: dict[str, tuple[object, bool]] = {
    "max_tokens": (3, True),
    "min_tokens": (1, False),
    "temperature": (0.7, False),
    "top_p": (0.5, True),
    "top_k": (2, True),
    "min_p": (0.5, True),
    "seed": (5, True),
    "logit_bias": ({3: 1.0}, False),
    "allowed_token_ids": ((3,), False),
    "bad_sequences": (((3,),), False),
    "presence_penalty": (0.1, False),
    "frequency_penalty": (-0.1, False),
    "repetition_penalty": (1.1, False),
    "stop_token_ids": ((3,), True),
    "eos_token_ids": ((3,), True),
    "ignore_eos": (True, True),
    "logprobs": (2, True),
    "prompt_logprobs": (2, True),
    "grammar": (GrammarSpec("json_object"), False),
}
"""A value of each parameter, and whether plain argmax still decides with it."""


@pytest.mark.parametrize("name", [field.name for field in fields(SamplingParams)])
def test_argmax_decides_unless_a_parameter_says_otherwise(name: str) -> None:
    value, plain = PLAIN_GREEDY[name]
    assert SamplingParams(temperature=0.0).plain_greedy
    assert SamplingParams(**{"temperature": 0.0, name: value}).plain_greedy == plain


class TestMasks:
    def masked(self, subject: SequenceSampler, drafts: Sequence[int] = ()) -> list[set[int]]:
        scores = subject.scores(torch.zeros(len(drafts) + 1, 16), drafts)
        return [set(torch.isinf(row).nonzero().flatten().tolist()) for row in scores]

    def test_a_bad_sequence_is_forbidden_at_its_last_token(self) -> None:
        params: dict[str, Any] = {"bad_sequences": ((7,), (3, 5, 6), (5, 9))}
        assert self.masked(sampler(**params), [3, 5, 6]) == [{7}, {7}, {7, 6, 9}, {7}]
        resumed = sampler(so_far=(3, 5), **params)
        assert self.masked(resumed) == [{7, 6, 9}]
        resumed.commit([5])
        assert self.masked(resumed) == [{7, 9}]

    def test_the_prompt_begins_no_bad_sequence(self) -> None:
        assert self.masked(sampler(bad_sequences=((PROMPT[-1], 6),))) == [set()]

    def test_only_sequences_remember(self) -> None:
        assert not sampler(bad_sequences=((7,), (9,)), allowed_token_ids=(1, 7)).remembers
        assert sampler(bad_sequences=((7,), (3, 5))).remembers
        scores = sampler(bad_sequences=((7,),)).tree_scores(torch.zeros(3, 16), [1, 1])
        assert torch.isinf(scores).nonzero().tolist() == [[0, 7], [1, 7], [2, 7]]

    def test_no_mask_leaves_nothing(self) -> None:
        rest = set(range(16)) - {4, 5}
        subject = sampler(
            allowed_token_ids=(4, 5), bad_sequences=((4,), (6, 5)), stop_token_ids=(4, 5), min_tokens=9
        )
        assert self.masked(subject, [6]) == [rest | {4}, rest]


def test_unknown_ids_are_refused_by_name() -> None:
    for params, name in (
        ({"logit_bias": {16: 1.0}}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"stop_token_ids": (99,)}, "stop_token_ids"),
        ({"allowed_token_ids": (16,)}, "allowed_token_ids"),
        ({"bad_sequences": ((1, 16),)}, "bad_words"),
        ({"bad_sequences": ((),)}, "bad_words"),
    ):
        with pytest.raises(ParameterError) as caught:
            sampler(**params)
        assert caught.value.param == name


def test_keys_and_what_drafters_are_told() -> None:
    subject = sampler(seed=-9, choice=2, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1)
    assert subject.key == derive_key(-9, 2)
    told = subject.draft_sampling("coupled")
    assert (told.key, told.temperature, told.top_k, told.top_p, told.min_p, told.rule) == (
        derive_key(-9, 2), 0.7, 5, 0.9, 0.1, "coupled",
    )  # fmt: skip
    assert sampler(temperature=1e-6).draft_sampling("leviathan").temperature == 0.0
    assert sampler().draft_sampling("leviathan").rule == "leviathan"


class TestGrammar:
    tokenizer = toy_tokenizer()
    vocab_size = len(tokenizer) + 5
    compiler = GrammarCompiler(tokenizer, vocab_size, (0, 1))
    spec = GrammarSpec("regex", "ab?c")

    def sampler(
        self, spec: GrammarSpec | None = None, so_far: tuple[int, ...] = (), **params: Any
    ) -> SequenceSampler:
        spec = spec or self.spec
        params = {"temperature": 0.0, "eos_token_ids": (0, 1), **params}
        request = EngineRequest("r", PROMPT, SamplingParams(grammar=spec, **params), output_ids_so_far=so_far)
        return SequenceSampler(request, self.vocab_size, self.compiler.compile(spec))

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def survivors(self, scores: Tensor) -> list[set[int]]:
        return [set(surviving_ids(row).tolist()) for row in scores]

    def test_each_row_knows_the_drafts_before_it(self) -> None:
        a, b, c = self.ids("abc")
        subject = self.sampler()
        logits = torch.zeros(4, self.vocab_size)
        for _ in range(2):  # scoring changes no state
            assert self.survivors(subject.scores(logits, [a, b, c]))[1:] == [
                {b, c} | set(self.ids("bc")),
                {c},
                {0, 1},
            ]
        assert subject.admissible([a, c, 0, a]) == 3
        assert subject.admissible([a, a]) == 1
        with pytest.raises(GrammarError):
            subject.scores(logits[:3], [a, a])
        subject.commit([a, b])
        assert self.survivors(subject.scores(logits[:1], [])) == [{c}]

    def test_a_drawn_token_that_is_forbidden_is_rejected_by_the_rule(self) -> None:
        """Dropped before it was judged, its place would be a plain sample of p: 0.75 for the first here."""
        b, c, x = self.ids("bcx")
        subject = self.sampler(so_far=self.ids("a"), temperature=1.0)
        logits = torch.full((2, self.vocab_size), -math.inf)
        logits[:, [b, c, x]] = torch.tensor([1.0, 1.0, 3.0])
        q = ((b, x), (0.5, 0.5))
        rule = get_rule("leviathan")
        assert subject.admissible([x]) == 0
        counts = {b: 0, c: 0}
        for seed in range(8000):
            key = derive_key(seed, 0)
            draft = b if uniform(key, 0, DRAFT) < 0.5 else x
            assert subject.admissible([draft], drawn=True) == 1
            scores = subject.scores(logits, [draft], drawn=True)
            verdict = rule.verify(scores, [draft], [q], key=key, first_position=0, greedy=False)
            counts[b if verdict.accepted else verdict.next_token] += 1
        assert counts[b] / 8000 == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 8000))
        assert subject.admissible([b, x, c], drawn=True) == 2

    def test_resuming_restores_the_grammar(self) -> None:
        subject = self.sampler(so_far=self.ids("ab"))
        assert self.survivors(subject.scores(torch.zeros(1, self.vocab_size), [])) == [set(self.ids("c"))]
        with pytest.raises(ParameterError) as caught:
            self.sampler(so_far=self.ids("x"))
        assert caught.value.param == "output_ids_so_far"

    def test_a_complete_grammar_wins_over_min_tokens(self) -> None:
        (a,) = self.ids("a")
        subject = self.sampler(GrammarSpec("regex", "a{1,2}"), min_tokens=10)
        rows = self.survivors(subject.scores(torch.zeros(3, self.vocab_size), [a, a]))
        assert rows[1] == {a}
        assert rows[2] == {0, 1}

    def test_rows_after_an_end_id_are_defined(self) -> None:
        drafts = [*self.ids("ac"), 1]
        subject = self.sampler()
        assert subject.admissible(drafts) == 3
        assert self.survivors(subject.scores(torch.zeros(4, self.vocab_size), drafts))[-1] == {0, 1}

    def test_bias_does_not_revive_what_the_grammar_forbids(self) -> None:
        scores = self.sampler(logit_bias={50: 100.0}, temperature=1.0).scores(
            torch.zeros(1, self.vocab_size), []
        )
        assert float(scores[0, 50]) == -math.inf

    def test_a_grammar_needs_its_matcher(self) -> None:
        with pytest.raises(ValueError, match="matcher"):
            SequenceSampler(EngineRequest("r", PROMPT, SamplingParams(grammar=self.spec)), 16, None)


class TestLogprobs:
    def test_values_order_and_batches(self) -> None:
        logits = random_logits(4, 1000, 8)
        expected = torch.log_softmax(logits.double(), -1)
        together = token_logprobs(logits, [5, 6, 7, 8], 3)
        for j, entry in enumerate(together):
            assert entry == token_logprobs(logits[j], [5 + j], 3)[0]
            assert entry.token_id == 5 + j
            assert entry.logprob == pytest.approx(float(expected[j, 5 + j]), abs=1e-5)
            values, ids = expected[j].topk(3)
            assert [token for token, _ in entry.top] == ids.tolist()
            assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-5)

    def test_equal_alternatives_come_by_id(self) -> None:
        entry = token_logprobs(torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]), [0], 3)[0]
        assert [token for token, _ in entry.top] == [1, 3, 0]

    def test_none_and_more_than_there_are(self) -> None:
        row = torch.zeros(3)
        assert token_logprobs(row, [1], 0)[0].top == ()
        assert len(token_logprobs(row, [1], 20)[0].top) == 3
        assert token_logprobs(torch.zeros(0, 3), [], 5) == []
        with pytest.raises(ValueError, match="rows"):
            token_logprobs(row, [1, 2], 0)


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", 1e39), ("repetition_penalty", 1e-38), ("repetition_penalty", 1e38)]
)
def test_what_would_leave_no_finite_scores_is_refused(name: str, value: float) -> None:
    with pytest.raises(ParameterError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize("temperature", [1e-5, 1e6])
@pytest.mark.parametrize("penalty", REPETITION_PENALTIES)
def test_scores_stay_finite_at_the_limits(temperature: float, penalty: float) -> None:
    subject = sampler(
        temperature=temperature, repetition_penalty=penalty, top_p=0.9, min_p=1e-6, top_k=2**40, min_tokens=5,
        logit_bias={4: 100.0, 3: -100.0}, stop_token_ids=(2,),
    )  # fmt: skip
    (row,) = subject.scores(torch.linspace(-50.0, 50.0, 16)[None], [])
    kept = surviving_ids(row)
    assert len(kept) > 0
    assert 2 not in kept
    assert row[kept].isfinite().all()
