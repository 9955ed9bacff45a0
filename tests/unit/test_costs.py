"""What rounds are believed to cost, on machines that are busy, slow or restless."""

from __future__ import annotations

import math
import random

import pytest

from actors.costs import CostModel


def test_cost_model_interpolates_extrapolates_and_never_falls() -> None:
    costs = CostModel()
    assert costs.seconds(3) == 0.0
    for rows, seconds in ((1, 0.010), (5, 0.014), (9, 0.012)):
        costs.observe(rows, seconds)
    assert abs(costs.seconds(3) - 0.011) < 1e-9, "5, measured once, takes no longer than 9"
    assert abs(costs.seconds(9) - 0.012) < 1e-9
    assert costs.seconds(9) == costs.seconds(5)
    for _ in range(200):
        costs.observe(5, 0.014)
        costs.observe(9, 0.012)
    assert costs.seconds(5) == costs.seconds(9), "they contradict each other, and are averaged"
    assert 0.012 < costs.seconds(5) < 0.014
    assert costs.seconds(100) >= costs.seconds(9)
    before = costs.seconds(1)
    costs.observe(1, 10.0)
    assert costs.seconds(1) < 2 * before, "one stolen core does not ruin the profile"


def test_a_profile_from_a_busy_moment_does_not_last() -> None:
    costs = CostModel()
    for rows in (1, 2, 4, 8):
        costs.observe(rows, 0.1 + 0.01 * rows)
    for _ in range(200):
        costs.observe(1, 0.011)
    assert costs.seconds(4) < 0.03
    assert costs.seconds(4) >= costs.seconds(1)


def test_what_context_costs_is_measured_and_kept_apart() -> None:
    costs = CostModel()

    def run(rows: int, context: int) -> float:
        return (4.0 + 0.2 * rows + context * (0.001 + 0.0005 * (rows - 1))) / 1e3

    costs.profile_attention(run, 9, (64, 1024))
    assert costs.attention_s(1000) == pytest.approx(1e-3)
    assert costs.attention_s(1000, 3) == pytest.approx(2e-3)
    assert costs.drafted_attention_s(1000) == pytest.approx(0.5e-3)
    assert costs.attention_s(1000, 3, sequences=4) == pytest.approx(2e-3), "not measured yet"
    costs.profile_together(
        lambda sequences, context: (5.0 + sequences * context * 0.0007) / 1e3, 4, (64, 512)
    )
    assert costs.attention_s(1000, 3, sequences=4) == pytest.approx(1.7e-3)
    assert costs.attention_s(1000, 3) == pytest.approx(2e-3)
    costs.observe(3, run(3, 2000), costs.attention_s(2000, 3))
    assert costs.seconds(3) == pytest.approx(4.6e-3), "what is left is the cost of the rows"


def test_a_profile_taken_while_the_machine_was_busy_does_not_outlive_that() -> None:
    costs = CostModel()
    costs.profile(lambda rows: {1: 5.0, 3: 6.0, 5: 18.0, 9: 12.0}[rows] / 1e3, (1, 3, 5, 9))
    assert costs.seconds(5) == pytest.approx(12e-3), "five rows cost no more than nine"
    costs.observe(9, 7e-3)
    assert costs.seconds(9) < 7.5e-3, "one quicker round says more than the profile"
    assert costs.seconds(5) == costs.seconds(9)
    costs.observe(9, 30e-3)
    assert costs.seconds(9) < 10e-3, "a slower one does not"


def test_a_machine_that_is_slow_for_a_while_does_not_bend_the_profile() -> None:
    """It runs at half its speed in two of five passes, for a whole number of turns or not."""
    true = {rows: (9.0 + 0.3 * rows) / 1e3 for rows in (1, 2, 3, 5, 9, 17, 33)}
    costs, passes = CostModel(), 0

    def run(rows: int) -> float:
        nonlocal passes
        passes += 1
        return true[rows] * (1.5 if passes // 10 % 5 in (1, 2) else 1.0)

    for _ in range(6):
        costs.profile(run, tuple(true))
    for rows, seconds in true.items():
        assert costs.seconds(rows) == pytest.approx(seconds, rel=0.01)


def test_context_that_seemed_dear_because_something_else_ran_is_not_believed() -> None:
    costs = CostModel()
    times = iter(
        [9.0] * 3 + [9.0] * 3 + [40.0] * 3 + [9.0] * 3
    )  # (1, long), (1, short), (9, long), (9, short)
    costs.profile_attention(lambda rows, context: next(times) / 1e3, 9, (64, 1024))
    assert costs.drafted_attention_s(1000) == 0.0


def test_noise_does_not_make_rounds_with_drafts_seem_ever_dearer() -> None:
    rng = random.Random(5)
    costs = CostModel()
    for rows, seconds in ((1, 0.0100), (2, 0.0102), (9, 0.0120)):
        costs.observe(rows, seconds)
    for _ in range(20_000):  # minutes of plain decoding on a machine with neighbours
        stolen = rng.expovariate(1.0) if rng.random() < 0.03 else 0.0
        costs.observe(1, 0.010 * (1.0 + abs(rng.gauss(0.0, 0.15)) + stolen))
    assert 1.1 < costs.seconds(9) / costs.seconds(1) < 1.3


def test_a_profile_keeps_its_shape_while_the_machine_comes_and_goes() -> None:
    """Rounds of few row counts at a time, of a speed that wanders, with stolen cores: each row count of the
    profile keeps its place among the others, those that are seldom met too."""
    rng = random.Random(2)
    costs = CostModel()
    true = {rows: (4.8 + 0.15 * rows) / 1e3 for rows in (*range(1, 14), 17, 33)}
    costs.profile(lambda rows: true[rows], (1, 2, 3, 5, 9, 17, 33))
    speed = 0.0
    for block in range(40):
        usual = (1, 4, 8, 2)[block % 4]
        for _ in range(60):
            speed = 0.98 * speed + rng.gauss(0.0, 0.05)
            rows = usual if rng.random() < 0.8 else rng.randint(usual + 1, 13)
            noise = abs(rng.gauss(0.0, 0.15)) + (rng.uniform(0.3, 2.0) if rng.random() < 0.04 else 0.0)
            costs.observe(rows, true[rows] * 1.3 * math.exp(speed + noise))
    believed = costs.measured()
    for rows in (1, 2, 3, 5, 9, 13, 17, 33):
        assert believed[rows] / believed[4] == pytest.approx(true[rows] / true[4], rel=0.15)


def test_what_context_costs_is_the_difference_of_the_quickest_rounds() -> None:
    costs = CostModel()

    def run(rows: int, context: int) -> float:
        return (4.0 + 0.2 * rows + context * (0.001 + 0.0005 * (rows - 1))) / 1e3

    def disturbed(rows: int, context: int) -> float:
        return run(rows, context) * (1.5 if context == 1024 else 1.0)

    costs.profile_attention(disturbed, 9, (64, 1024))
    assert costs.attention_s(1000) > 3e-3
    costs.profile_attention(run, 9, (64, 1024))
    assert costs.attention_s(1000) == pytest.approx(1e-3)
    costs.profile_attention(disturbed, 9, (64, 1024))
    assert costs.attention_s(1000, 3) == pytest.approx(2e-3)


def test_of_rows_that_are_often_met_few_rounds_are_observed() -> None:
    costs = CostModel()
    costs.profile(lambda rows: 0.01 + rows / 1e3, (1, 5))
    observed = 0
    for _ in range(400):
        observed += costs.ended(1, 0.02)
    assert 100 < observed < 130
    assert costs.seconds(1) == pytest.approx(0.02, rel=0.02), "which is enough"
    assert costs.ended(5, 0.03)
    assert costs.ended(3, 0.025), "what was never met is"


@pytest.mark.parametrize("again", [1, 15])
def test_a_profile_taken_again_takes_the_place_of_what_was_learned_against_the_first(again: int) -> None:
    """The first was taken beside other processes; rounds came before the machine was quiet."""
    true = {1: 5.0e-3, 5: 5.6e-3, 9: 6.4e-3, 17: 10.0e-3}
    busy = {1: 6.5e-3, 5: 16.0e-3, 9: 17.0e-3, 17: 20.0e-3}
    costs = CostModel()
    costs.profile(busy.__getitem__, tuple(true))
    for number in range(300):
        rows = (1, 1, 1, 5, 9)[number % 5]
        costs.observe(rows, true[rows])
    costs.observe(7, 6.0e-3)
    for _ in range(again + 3):  # the busy turns count too
        costs.profile(true.__getitem__, tuple(true), repeats=1)
    for rows, seconds in true.items():
        assert costs.seconds(rows) == pytest.approx(seconds, rel=0.1), rows
    assert costs.seconds(5) <= costs.seconds(7) <= costs.seconds(9)


def test_many_row_counts_take_no_more_room_than_some() -> None:
    costs = CostModel()
    costs.profile(lambda rows: (4.0 + 0.1 * rows) / 1e3, (1, 2, 3, 5, 9, 17, 33))
    for rows in random.Random(0).sample(range(1, 2001), 2000):
        costs.observe(rows, (4.0 + 0.1 * rows) / 1e3)
    assert len(costs.measured()) <= 64
    seconds = [costs.seconds(rows) for rows in range(1, 2001)]
    assert seconds == sorted(seconds)
    for rows in (1, 8, 33, 100, 700, 2000):
        assert costs.seconds(rows) == pytest.approx((4.0 + 0.1 * rows) / 1e3, rel=0.1), rows
