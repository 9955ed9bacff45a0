"""Figures of the benchmark: latency, acceptance, goodput, paired comparisons."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.bench.engines.interface import BenchResponse, SpeculationCounts
from cluster.bench.engines.speculation_payload import speculation_counts
from cluster.bench.metrics import (
    Acceptance,
    LatencySummary,
    Percentiles,
    Slo,
    e2e,
    tokens_per_second,
    tpot,
    ttft,
)
from cluster.bench.paired import MIN_PAIRS, compare, compare_ratios, median_interval_rank


def response(*arrivals: tuple[float, int], started: float = 10.0, error: str | None = None) -> BenchResponse:
    return BenchResponse("r", started, [(started + t, n) for t, n in arrivals], error=error)


def test_latency_of_chunks_with_several_tokens() -> None:
    r = response((0.5, 2), (0.9, 3), (1.5, 5))
    assert ttft(r) == pytest.approx(0.5)
    assert tpot(r) == pytest.approx(1.0 / 8)
    assert e2e(r) == pytest.approx(1.5)
    assert tokens_per_second(r) == pytest.approx(10 / 1.5)


def test_one_token_a_chunk_gives_the_usual_tpot() -> None:
    r = response(*((0.2 + 0.03 * i, 1) for i in range(20)))
    assert tpot(r) == pytest.approx((e2e(r) - (ttft(r) or 0)) / 19)


def test_degenerate_responses() -> None:
    empty, one = response(), response((0.4, 7))
    assert (ttft(empty), tpot(empty), tokens_per_second(empty)) == (None, None, None)
    assert ttft(one) == pytest.approx(0.4)
    assert tpot(one) is None
    # A chunk without tokens (a finish reason alone) is no arrival of a token.
    assert ttft(response((0.1, 0), (0.3, 1), (0.5, 1))) == pytest.approx(0.3)


def test_percentiles_leave_out_what_is_missing() -> None:
    p = Percentiles.of([None, *map(float, range(1, 102))])
    assert p is not None
    assert (p.count, p.mean, p.p50, p.p90, p.p99) == (101, 51.0, 51.0, 91.0, 100.0)
    assert Percentiles.of([None]) is None


def test_goodput_counts_requests_that_meet_every_objective() -> None:
    fast, slow_start, slow_rest = (
        response((0.1, 1), (0.2, 10)),
        response((0.9, 1), (1.0, 10)),
        response((0.1, 1), (2.1, 10)),
    )
    failed = response((0.1, 1), error="gone")
    answers = [fast, slow_start, slow_rest, failed]
    both = LatencySummary.of(answers, 2.0, Slo(0.5, 0.05))
    assert both.goodput == pytest.approx(1 / 2.0)
    assert LatencySummary.of(answers, 2.0, Slo(0.5)).goodput == pytest.approx(2 / 2.0)
    assert LatencySummary.of(answers, 2.0, Slo()).goodput == pytest.approx(3 / 2.0)
    assert (both.errors, both.requests, both.requests_per_s) == (1, 4, 1.5)
    assert both.output_tokens_per_s == pytest.approx(33 / 2.0)


def counts(tokens: int, histogram: list[int], drafted: int, **drafters: tuple[int, int]) -> BenchResponse:
    accepted = sum(k * n for k, n in enumerate(histogram))
    metrics = {
        "speculative_decoding": {
            "acceptance_histogram": histogram,
            "num_spec_steps": sum(histogram),
            "num_accepted_draft_tokens": accepted,
            "num_draft_tokens": drafted,
        },
        "drafters": {
            name: {"num_draft_tokens": d, "num_accepted_draft_tokens": a} for name, (d, a) in drafters.items()
        },
    }
    r = response((1.0, tokens))
    r.speculation = speculation_counts(metrics, tokens)
    return r


def test_acceptance_from_the_payload() -> None:
    # 10 tokens: 5 accepted drafts, so 5 rounds, of which 4 had drafts.
    r = counts(10, [1, 1, 2], 8, prompt_lookup=(6, 4), nested=(2, 1))
    assert r.speculation == SpeculationCounts(5, 8, 5, (3, 2), {"prompt_lookup": (6, 4), "nested": (2, 1)})
    pooled = Acceptance.of([r, counts(6, [], 0), response((1.0, 5))])
    assert pooled is not None
    assert (pooled.requests, pooled.rounds, pooled.drafted, pooled.accepted) == (2, 11, 8, 5)
    assert pooled.mean_accepted_tokens == pytest.approx(16 / 11)
    assert pooled.rate == pytest.approx(5 / 8)
    assert pooled.by_position == pytest.approx((3 / 11, 2 / 11))
    assert pooled.by_exit == pytest.approx({"prompt_lookup": 4 / 6, "nested": 1 / 2})


def test_plain_decoding_accepts_one_token_a_round() -> None:
    plain = Acceptance.of([counts(7, [], 0)])
    assert plain is not None
    assert (plain.mean_accepted_tokens, plain.rate) == (1.0, None)
    assert Acceptance.of([response((1.0, 3))]) is None
    assert speculation_counts(None, 3) is None
    assert speculation_counts({"speculative_decoding": None}, 3) is None


# Table of the sign test: largest k with P(Binomial(n, 1/2) < k) <= 0.025.
@pytest.mark.parametrize(
    ("pairs", "rank"), [(0, 0), (5, 0), (6, 1), (8, 1), (9, 2), (12, 3), (15, 4), (20, 6), (25, 8), (60, 22)]
)
def test_ranks_of_the_median_interval(pairs: int, rank: int) -> None:
    assert median_interval_rank(pairs) == rank


def test_the_interval_holds_the_median_as_often_as_it_claims() -> None:
    rng, hits, trials = random.Random(7), 0, 2000
    for _ in range(trials):
        c = compare_ratios([math.exp(rng.gauss(0.1, 0.5)) for _ in range(15)])
        assert c is not None
        assert c.low is not None
        assert c.high is not None
        hits += c.low <= math.exp(0.1) <= c.high
    assert hits / trials > 0.95  # exactly 0.9648


def test_verdicts() -> None:
    def verdict(ratios: list[float], threshold: float = 1.0) -> str:
        c = compare_ratios(ratios, threshold)
        assert c is not None
        return c.verdict

    assert verdict([1.2] * MIN_PAIRS) == "above"
    assert verdict([1.2] * (MIN_PAIRS - 1)) == "not resolved"
    assert verdict([0.8] * MIN_PAIRS) == "below"
    assert verdict([1.2] * MIN_PAIRS, threshold=1.2) == "not resolved"
    # Three of 15 on the other side leave the interval clear of it, four do not.
    assert verdict([0.9] * 3 + [1.2] * 12) == "above"
    assert verdict([0.9] * 4 + [1.2] * 11) == "not resolved"


def test_only_common_pairs_are_compared() -> None:
    c = compare({1: 20.0, 2: 30.0, 3: 1.0}, {1: 10.0, 2: 10.0, 4: 1.0})
    assert c is not None
    assert (c.pairs, c.median, c.low, c.high, c.minimum, c.maximum) == (2, 2.5, None, None, 2.0, 3.0)
    assert compare({1: 1.0}, {2: 1.0}) is None


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_impossible_ratios_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        compare_ratios([1.0, bad])


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=60))
def test_swapping_the_sides_inverts_the_verdict(ratios: list[float]) -> None:
    one, other = compare_ratios(ratios), compare_ratios([1 / r for r in ratios])
    assert one is not None
    assert other is not None
    assert one.minimum <= one.median <= one.maximum
    assert one.median == statistics.median(ratios)
    if one.low is not None and one.high is not None:
        assert one.low <= one.median <= one.high
        assert other.low == pytest.approx(1 / one.high)
    opposite = {"above": "below", "below": "above", "not resolved": "not resolved"}
    if 1.0 not in (one.low, one.high):
        assert other.verdict == opposite[one.verdict]
