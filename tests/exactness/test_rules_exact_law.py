"""Verification rules emit the target's law exactly: chi-square over a toy vocabulary.

A two-token model: the law of the second token depends on the first. One draft is proposed for the first
token; if it is accepted the same verification gives the second token, otherwise a plain step does. 50,000
keys a case, all seeds fixed, so the p-values are constants of the code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats
from torch import Tensor

from actors.costs import CostModel
from actors.drafting.early_stop import EarlyStop
from actors.drafting.interface import DraftQuery, SessionDraft, SessionOpen, SessionUpdate
from actors.drafting.local_source import LocalDraftSource
from actors.drafting.selector import DrafterPool
from actors.engine.controller import Candidate, Controller
from actors.engine.messages import EngineRequest
from actors.engine.sequence import Sequence as EngineSequence
from actors.engine.speculator import DraftTimeouts, Speculator
from actors.sampling.noise import DRAFT, GUMBEL, derive_key, gumbel, philox4x32, to_gumbel, uniform
from actors.sampling.params import DraftSampling, GrammarSpec, SamplingParams, SpeculationParams
from actors.sampling.pipeline import SequenceSampler
from actors.sampling.truncation import keep_at_least, survival_threshold
from actors.verification.registry import get_rule
from actors.verification.rule import DraftDistribution, VerificationRule
from tests.exactness.harness import AnyText

SAMPLES = 50_000
P_MIN = 1e-4
VOCAB = 5
POSITION = 17
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Drafts:
    """One drafted token a key, and the distribution they were drawn from (none for deterministic drafts)."""

    tokens: list[int]
    q: tuple[DraftDistribution, ...] = ()


Drafter = Callable[[Sequence[int]], Drafts]


@pytest.fixture(scope="module")
def keys() -> list[int]:
    return [derive_key(seed, 0) for seed in range(SAMPLES)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def target_logits() -> tuple[Tensor, Tensor]:
    """float32 [V] for the first token, [V, V] for the second given the first."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(VOCAB, generator=generator) * 1.2, torch.randn(VOCAB, VOCAB, generator=generator) * 1.2


def draft_logits() -> Tensor:
    """A draft that is related to the target and clearly differs from it."""
    generator = torch.Generator().manual_seed(11)
    return target_logits()[0] + torch.randn(VOCAB, generator=generator)


def nucleus(row: Tensor, top_p: float) -> Array:
    """The exact law by brute force: softmax, cut, renormalise."""
    p = np.exp(row.double().numpy())
    p /= p.sum()
    order = np.argsort(-p)
    size = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
    law = np.zeros_like(p)
    law[order[:size]] = p[order[:size]]
    return law / law.sum()


def processed(row: Tensor, top_p: float) -> Tensor:
    out = row.clone()
    keep_at_least(out, survival_threshold(out, top_p=top_p))
    return out


def noise_table(keys: Sequence[int], stream: int) -> Tensor:
    """float32 [N, V]: the noise of each key at `POSITION`, by the tensor form of the generator."""
    words = torch.tensor([(key & 0xFFFFFFFF, key >> 32) for key in keys])
    lanes = [
        word
        for block in range((VOCAB + 3) // 4)
        for word in philox4x32((block, POSITION, 0, stream), (words[:, 0], words[:, 1]))
    ]
    table = to_gumbel(torch.stack([torch.as_tensor(lane) for lane in lanes[:VOCAB]], dim=1))
    assert torch.equal(table[7], gumbel(keys[7], POSITION, VOCAB, stream=stream))
    return table


def coupled_drafter(keys: Sequence[int]) -> Drafts:
    """Adds the target's noise to its own logits."""
    return Drafts((draft_logits() + noise_table(keys, GUMBEL)).argmax(1).tolist())


def wrong_drafter(keys: Sequence[int]) -> Drafts:
    """Always the target's least likely token."""
    return Drafts([int(target_logits()[0].argmin())] * len(keys))


def sampled_drafter(keys: Sequence[int], top_m: int = VOCAB) -> Drafts:
    """Draws from its own renormalised top-m and ships those pairs."""
    values, ids = draft_logits().topk(top_m)
    tokens = ids[(values + noise_table(keys, DRAFT)[:, ids]).argmax(1)].tolist()
    return Drafts(tokens, ((tuple(ids.tolist()), tuple(torch.softmax(values, 0).tolist())),))


def emit(
    rule: VerificationRule, rows: Tensor, second: Tensor, key: int, draft: int, q: Sequence[DraftDistribution]
) -> tuple[int, int, bool]:
    """The first two tokens of one request, and whether its draft was accepted."""
    verdict = rule.verify(rows, (draft,), q, key=key, first_position=POSITION, greedy=False)
    token = verdict.next_token
    if verdict.accepted:
        return draft, token, True
    plain = rule.verify(second[token : token + 1], (), (), key=key, first_position=POSITION + 1, greedy=False)
    return token, plain.next_token, False


def p_value(counts: npt.NDArray[np.int64], law: Array) -> float:
    """Chi-square of counts against probabilities; 0 when something impossible was seen."""
    possible = law > 0
    if counts[~possible].any():
        return 0.0
    if possible.sum() == 1:
        return 1.0
    expected = law[possible] * counts.sum()
    rare = expected < 5
    observed = counts[possible]
    if rare.any():
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    return float(stats.chisquare(observed, expected).pvalue)


@dataclass(frozen=True)
class Outcome:
    p_first: float
    p_joint: float
    acceptance: float


def run(rule: VerificationRule, drafter: Drafter, top_p: float, keys: Sequence[int]) -> Outcome:
    first_logits, second_logits = target_logits()
    first = processed(first_logits, top_p)
    second = torch.stack([processed(row, top_p) for row in second_logits])
    blocks = [torch.stack((first, row)) for row in second]
    drafts = drafter(keys)
    counts = np.zeros((VOCAB, VOCAB), dtype=np.int64)
    accepted = 0
    for key, draft in zip(keys, drafts.tokens, strict=True):
        a, b, hit = emit(rule, blocks[draft], second, key, draft, drafts.q)
        counts[a, b] += 1
        accepted += hit
    law = nucleus(first_logits, top_p)
    joint = law[:, None] * np.stack([nucleus(row, top_p) for row in second_logits])
    return Outcome(p_value(counts.sum(1), law), p_value(counts.ravel(), joint.ravel()), accepted / len(keys))


def top_2_drafter(keys: Sequence[int]) -> Drafts:
    return sampled_drafter(keys, 2)


@pytest.mark.parametrize(
    ("rule", "drafter", "top_p"),
    [
        ("coupled", coupled_drafter, 1.0),
        ("coupled", coupled_drafter, 0.8),
        ("coupled", wrong_drafter, 1.0),
        ("leviathan", sampled_drafter, 1.0),
        ("leviathan", top_2_drafter, 0.8),
        ("leviathan", coupled_drafter, 0.8),
        ("leviathan", wrong_drafter, 1.0),
    ],
)
def test_rule_emits_the_target_law(rule: str, drafter: Drafter, top_p: float, keys: list[int]) -> None:
    outcome = run(get_rule(rule), drafter, top_p, keys)
    assert outcome.p_first >= P_MIN
    assert outcome.p_joint >= P_MIN
    if drafter is not wrong_drafter:
        # Both branches of the rule were taken.
        assert 0.1 < outcome.acceptance < 0.99
    if rule == "leviathan" and drafter is sampled_drafter:
        # Acceptance is sum min(p, q): corollary 3.6 of arXiv 2211.17192.
        expected = np.minimum(nucleus(target_logits()[0], top_p), nucleus(draft_logits(), 1.0)).sum()
        assert outcome.acceptance == pytest.approx(expected, abs=4 * np.sqrt(0.25 / len(keys)))


def test_the_published_chain_defect_is_caught(keys: list[int]) -> None:
    """Argmax drafts judged with p/q are not lossless: p=(.5,.3,.2), q=(.6,.3,.1) give (.833, 0, .167)."""
    p, q = np.array([0.5, 0.3, 0.2]), (0.6, 0.3, 0.1)
    rule = get_rule("leviathan")
    scores = torch.tensor(np.log(np.stack((p, p)))).float()
    counts = np.zeros(3, dtype=np.int64)
    for key in keys:
        verdict = rule.verify(scores, (0,), (((0, 1, 2), q),), key=key, first_position=3, greedy=False)
        counts[0 if verdict.accepted else verdict.next_token] += 1
    assert p_value(counts, p) < 1e-100
    assert counts / SAMPLES == pytest.approx([5 / 6, 0, 1 / 6], abs=0.01)


class _Drawing:
    """Draws from q, and says how likely it was to draw what it drew."""

    name = "nested"
    learns = False

    def __init__(self, q: tuple[float, ...]) -> None:
        self.q = q

    def open(self, session: SessionOpen) -> None: ...
    def close(self, session_id: int) -> None: ...
    def reset(self, scope: str = "all") -> None: ...
    def commit(self, session_id: int, new_tokens: object, candidates: object = ()) -> None: ...

    def propose(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
        return [self._draft(query) for query in queries]

    def _draft(self, query: DraftQuery) -> SessionDraft:
        u, token = uniform(derive_key(query.session_id, 0), POSITION, DRAFT), 0
        while u >= self.q[token]:
            u, token = u - self.q[token], token + 1
        return SessionDraft(
            query.session_id, query.epoch, (token,), drafter=self.name, exit_depth=1,
            confidence=(self.q[token],), q=((tuple(range(len(self.q))), self.q),),
        )  # fmt: skip


class _Certain(_Drawing):
    """Always the same guess, without a distribution."""

    name = "prompt_lookup"

    def _draft(self, query: DraftQuery) -> SessionDraft:
        return SessionDraft(query.session_id, query.epoch, (0,), drafter=self.name, confidence=(0.45,))


@pytest.mark.parametrize("first", ["nested", "prompt_lookup"])
def test_a_pool_of_drafters_keeps_the_law(first: str) -> None:
    """A draft that was drawn must not be kept for what was drawn: 0.7 for the first token if it were."""
    p, q = np.array([0.5, 0.5]), (0.6, 0.4)
    drafters = [_Drawing(q), _Certain(q)]
    pool = DrafterPool(drafters if first == "nested" else drafters[::-1], max_sessions=1)
    rule = get_rule("leviathan")
    scores = torch.tensor(np.log(np.stack((p, p)))).float()
    counts, drawn = np.zeros(2, dtype=np.int64), 0
    for sid in range(12_000):
        sampling = DraftSampling(derive_key(sid, 0), 1.0, rule="leviathan")
        pool.open(SessionOpen(sid, (1,), 1, sampling))
        update = SessionUpdate(sid, 1, (), 1)
        pool.apply(update)
        (draft,) = pool.propose([update])
        verdict = rule.verify(
            scores, draft.token_ids, draft.q, key=sampling.key, first_position=POSITION, greedy=False
        )
        counts[draft.token_ids[0] if verdict.accepted else verdict.next_token] += 1
        drawn += bool(draft.q)
        pool.close(sid)
    assert p_value(counts, p) >= P_MIN
    assert drawn > 10_000


class _DrawingOn(_Drawing):
    """Draws one token after the other from q, until the budget is spent or the draft ends early."""

    def __init__(self, q: tuple[float, ...], early_stop: EarlyStop) -> None:
        super().__init__(q)
        self._early_stop = early_stop

    def _draft(self, query: DraftQuery) -> SessionDraft:
        tokens: list[int] = []
        survival = 1.0
        while len(tokens) < query.budget and not self._early_stop.ends(survival):
            u, token = uniform(derive_key(query.session_id, 0), POSITION + len(tokens), DRAFT), 0
            while u >= self.q[token]:
                u, token = u - self.q[token], token + 1
            tokens.append(token)
            survival *= self.q[token]
        return SessionDraft(
            query.session_id, query.epoch, tuple(tokens), drafter=self.name, exit_depth=1,
            confidence=tuple(self.q[token] for token in tokens),
            q=((tuple(range(len(self.q))), self.q),) * len(tokens),
        )  # fmt: skip


class _AsksForAll(Controller):
    """Chooses what to verify, not what to ask for."""

    def plan(self, candidates: Sequence[Candidate], *_: object, **__: object) -> list[int]:
        return [candidate.limit for candidate in candidates]


class _Without(AnyText):
    """A grammar that forbids one token wherever it comes."""

    def __init__(self, vocab_size: int, token: int) -> None:
        super().__init__(vocab_size)
        self._token = token

    def admissible(self, drafts: Sequence[int]) -> int:
        return [*drafts, self._token].index(self._token)

    def mask(self) -> Tensor:
        return super().mask().index_fill(0, torch.tensor([self._token]), False)


@pytest.mark.parametrize(
    ("stop_ids", "early_stop", "forbidden"),
    [((0,), EarlyStop(), None), ((), EarlyStop(threshold=0.75), None), ((), EarlyStop(), 2)],
    ids=["stop id", "early stop", "grammar"],
)
def test_a_length_that_the_controller_chooses_keeps_the_law(
    stop_ids: tuple[int, ...], early_stop: EarlyStop, forbidden: int | None
) -> None:
    """A draft of one token does not pay here and longer ones do. Were the length chosen by how far the draft
    goes, a first token that ends it would never be judged, and come out too seldom."""
    p, q = np.array([0.5, 0.3, 0.2]), (0.5, 0.2, 0.3)
    law = p.copy()
    if forbidden is not None:
        law[forbidden] = 0.0
        law /= law.sum()
    costs = CostModel()
    for rows, milliseconds in ((1, 7.4), (2, 12.0), (4, 12.0), (5, 30.0), (16, 30.0)):
        costs.observe(rows, milliseconds / 1e3)
    source = LocalDraftSource(DrafterPool([_DrawingOn(q, early_stop)]))
    speculator = Speculator(
        source, _AsksForAll(costs), DraftTimeouts(1.0, 1.0), 1000, len(p), clock=lambda: 0.0
    )
    rule, prompt = get_rule("leviathan"), (1,) * POSITION
    counts, judged = np.zeros((len(p), len(p)), dtype=np.int64), np.zeros(9, dtype=np.int64)
    for seed in range(8_000):
        sampling = SamplingParams(
            seed=seed, temperature=1.0, max_tokens=100, eos_token_ids=stop_ids,
            grammar=None if forbidden is None else GrammarSpec("regex", "[^2]*"),
        )  # fmt: skip
        request = EngineRequest(f"r{seed}", prompt, sampling, SpeculationParams())
        grammar = None if forbidden is None else _Without(len(p), forbidden)
        sampler = SequenceSampler(request, len(p), grammar)
        seq = EngineSequence(request, sampler, rule, sampler.key, 8, session_id=seed)
        seq.num_computed = POSITION - 1
        speculator.open(seq)
        speculator.submit([seq], 0)
        drafts: tuple[int, ...] = ()
        drawn_from: Sequence[DraftDistribution] = ()
        if (found := speculator.collect([seq], 0).get(seq)) is not None:
            draft, length = found
            drafts, drawn_from = draft.token_ids[:length], draft.q[:length]
        logits = torch.tensor(np.log(p)).float().repeat(len(drafts) + 1, 1)
        scores = sampler.scores(logits, drafts, drawn=bool(drawn_from))
        verdict = rule.verify(
            scores, drafts, drawn_from, key=sampler.key, first_position=POSITION, greedy=False
        )
        emitted = [*drafts[: verdict.accepted], verdict.next_token]
        if len(emitted) == 1:
            plain = sampler.scores(logits[:1], ())
            plain_verdict = rule.verify(
                plain, (), (), key=sampler.key, first_position=POSITION + 1, greedy=False
            )
            emitted.append(plain_verdict.next_token)
        counts[emitted[0], emitted[1]] += 1
        judged[len(drafts)] += 1
        speculator.release(seq)
    assert p_value(counts.sum(1), law) >= P_MIN
    assert p_value(counts.ravel(), np.outer(law, law).ravel()) >= P_MIN
    assert judged[1] > 1000, "also where no more was drafted"
    assert judged[3] > 1000, "so many pay"
    assert judged[7:].sum() == 0, "twice as many now and then"
