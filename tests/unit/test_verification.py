"""Rules on single blocks: invariance, ties, greedy, malformed q. Their laws are in tests/exactness."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.sampling.noise import ACCEPTANCE, RESIDUAL, gumbel, uniform
from actors.sampling.params import ParameterError
from actors.verification.coupled import accept_equal, sample, verify_greedy
from actors.verification.registry import RULES, get_rule
from actors.verification.rule import Verdict


def block(rows: int, vocab_size: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def truncated(scores: torch.Tensor, keep: int) -> torch.Tensor:
    out = scores.clone()
    out[out < out.topk(keep, dim=-1).values[:, -1:]] = -math.inf
    return out


@given(
    seed=st.integers(0, 10**6),
    key=st.integers(0, 2**64 - 1),
    count=st.integers(0, 5),
    vocab_size=st.sampled_from([7, 300, 1000]),
    greedy=st.booleans(),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_coupled_emits_the_same_whatever_is_drafted(
    seed: int, key: int, count: int, vocab_size: int, greedy: bool, data: st.DataObject
) -> None:
    """Position by position, with correct and wrong drafts mixed, the tokens are those of plain decoding."""
    scores = block(count + 1, vocab_size, seed)
    rule = get_rule("coupled")
    plain = [
        rule.verify(scores[j : j + 1], [], [], key=key, first_position=9 + j, greedy=greedy).next_token
        for j in range(count + 1)
    ]
    right = data.draw(st.integers(0, count))
    drafts = [plain[j] if j < right else (plain[j] + 1) % vocab_size for j in range(count)]
    verdict = rule.verify(scores, drafts, [], key=key, first_position=9, greedy=greedy)
    assert verdict == Verdict(right, plain[right])


@pytest.mark.parametrize("keep", [1, 2, 17, 240, 260, 999])
def test_sampling_among_few_survivors_equals_sampling_with_all_the_noise(keep: int) -> None:
    rows = truncated(block(20, 1000, keep), keep)
    for position, row in enumerate(rows):
        expected = int((row + gumbel(3, position, 1000)).argmax())
        assert sample(row, 3, position) == expected


def test_sampling_needs_a_survivor() -> None:
    for vocab_size in (5, 1000):
        with pytest.raises(ValueError, match="survives"):
            sample(torch.full((vocab_size,), -math.inf), 1, 1)


def test_rules_do_not_change_their_input() -> None:
    scores = truncated(block(3, 1000, 4), 40)
    before = scores.clone()
    drafts = [int(row.argmax()) for row in scores[:2]]
    q = [((drafts[0], 5), (0.5, 0.5)), ((drafts[1],), (1.0,))]
    for rule in RULES.values():
        for position in range(40):
            rule.verify(scores, drafts, q, key=7, first_position=position, greedy=False)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("name", ["coupled", "leviathan"])
def test_greedy_takes_the_first_of_equals_and_compares_ids(name: str) -> None:
    scores = torch.tensor([[0.0, 2.0, 2.0, 1.0], [5.0, 5.0, 5.0, -math.inf], [0.0, 0.0, 1.0, 1.0]])
    rule = get_rule(name)

    def judge(drafts: list[int]) -> Verdict:
        return rule.verify(scores[: len(drafts) + 1], drafts, [], key=1, first_position=1, greedy=True)

    assert judge([1, 0]) == Verdict(2, 2)
    assert judge([2, 0]) == Verdict(0, 1)
    assert judge([1, 1]) == Verdict(1, 0)
    assert judge([]) == Verdict(0, 1)


def test_accept_equal() -> None:
    assert accept_equal([3, 4, 5], [3, 4]) == Verdict(2, 5)
    assert accept_equal([3, 4, 5], [3, 9]) == Verdict(1, 4)
    assert accept_equal([3], []) == Verdict(0, 3)
    assert verify_greedy(torch.eye(3), [0, 1]) == Verdict(2, 2)


def test_leviathan_follows_its_formula() -> None:
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]))
    q = [((0, 1, 2), (0.2, 0.7, 0.1))]
    rule = get_rule("leviathan")
    residual = torch.log(torch.tensor([0.3, 0.0, 0.1]))
    seen = set()
    for position in range(60):
        verdict = rule.verify(scores, [1], q, key=11, first_position=position, greedy=False)
        if uniform(11, position, ACCEPTANCE) < 0.3 / 0.7:
            assert verdict == Verdict(1, int((scores[1] + gumbel(11, position + 1, 3)).argmax()))
        else:
            expected = int((residual + gumbel(11, position, 3, stream=RESIDUAL)).argmax())
            assert verdict == Verdict(0, expected)
        seen.add(verdict.accepted)
    assert seen == {0, 1}


def test_leviathan_never_accepts_what_the_target_excludes() -> None:
    scores = torch.tensor([[1.0, -math.inf, 0.0], [0.0, 0.0, 0.0]])
    for position in range(50):
        for q in ([], [((1,), (1.0,))], [((0, 1), (0.1, 0.9))]):
            verdict = get_rule("leviathan").verify(
                scores, [1], q, key=1, first_position=position, greedy=False
            )
            assert verdict.accepted == 0
            assert verdict.next_token != 1


def test_leviathan_accepts_a_draft_of_the_target_itself() -> None:
    scores = block(2, 50, 3)
    p = torch.softmax(scores[0], -1)
    q = [(tuple(range(50)), tuple(p.tolist()))]
    draft = int(p.argmax())
    accepted = [
        get_rule("leviathan").verify(scores, [draft], q, key=5, first_position=i, greedy=False).accepted
        for i in range(100)
    ]
    assert accepted == [1] * 100


@pytest.mark.parametrize(
    "q",
    [
        ((0, 1), (0.5,)),
        ((0, 0, 2), (0.2, 0.3, 0.5)),
        ((0, 1), (0.5, 0.5)),
        ((2, 99), (0.5, 0.5)),
        ((2, -1), (0.5, 0.5)),
        ((2, 0), (math.nan, 0.5)),
        ((2, 0), (0.5, -0.1)),
        ((2, 0), (0.0, 1.0)),
        ((2, 0), (math.inf, 1.0)),
    ],
    ids=str,
)
def test_leviathan_does_not_judge_by_a_q_that_cannot_be(q: tuple[tuple[int, ...], tuple[float, ...]]) -> None:
    scores = torch.zeros(2, 4)
    for position in range(20):
        verdict = get_rule("leviathan").verify(scores, [2], [q], key=5, first_position=position, greedy=False)
        assert verdict == Verdict(0, sample(scores[0], 5, position))


def test_leviathan_wants_one_q_a_draft() -> None:
    with pytest.raises(ValueError, match="one a draft"):
        get_rule("leviathan").verify(
            torch.zeros(3, 4), [1, 2], [((1,), (1.0,))], key=1, first_position=1, greedy=False
        )


def test_registry() -> None:
    assert get_rule("coupled").needs_q is False
    assert get_rule("leviathan").needs_q is True
    assert {rule.name for rule in RULES.values()} == set(RULES) == {"coupled", "leviathan"}
    with pytest.raises(ParameterError, match="recursive") as caught:
        get_rule("recursive")
    assert caught.value.param == "speculation.verification"
