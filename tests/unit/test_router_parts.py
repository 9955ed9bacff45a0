"""The router's formulas by hand: goodput, evidence, sorted plans, shedding."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.router.evidence import Evidence
from cluster.router.goodput import OFF, Choice, Queue, choices, cost_model, request_counts
from cluster.router.problem import Contender, is_sorted, loads
from cluster.router.reports import ExitAcceptance, Pin, TargetReport
from cluster.router.shedding import shed
from cluster.router.sorted_depths import sorted_plan


def test_goodput_by_hand() -> None:
    # Verification 10 ms + 1 ms a row, draft step 1 ms, round trip 2 ms, half of the tokens accepted.
    verify = cost_model({1: 0.011, 11: 0.021})
    (one, two) = choices(
        requests=(1,), activity=1.0, weight=2.0, verify=verify, step=cost_model({1: 0.001}), exit_depth=4,
        acceptance=[0.5, 0.5], latency_s=0.002, queue=Queue(),
    )  # fmt: skip
    # Two drafted, one verified: 1.5 tokens in 2 + 2 + 12 ms; both: 1.75 in 2 + 2 + 13 ms. Plain: 1 in 11 ms.
    assert one.gain == pytest.approx(1.5 * 11 / 15)
    assert two.gain == pytest.approx(1.75 * 11 / 17)
    assert two.value == pytest.approx(2.0 * math.log(two.gain))
    assert (one.load, two.load) == (pytest.approx(1 / 15), pytest.approx(2 / 17))


def test_what_does_not_pay_is_not_done_and_loads_nobody() -> None:
    (choice,) = choices(
        requests=(1,), activity=1.0, weight=1.0, verify=cost_model({1: 0.01, 2: 0.02}),
        step=cost_model({1: 0.001}), exit_depth=1, acceptance=[0.5], latency_s=0.0, queue=Queue(),
    )  # fmt: skip
    assert (choice.gain, choice.value, choice.load) == (1.0, 0.0, 0.0)


def test_a_busy_worker_costs_its_own_wait_and_the_others_theirs() -> None:
    def value(queue: Queue) -> float:
        (choice,) = choices(
            requests=(1,), activity=1.0, weight=1.0, verify=cost_model({1: 0.01, 2: 0.01}),
            step=cost_model({1: 0.002}), exit_depth=1, acceptance=[0.8], latency_s=0.0, queue=queue,
        )  # fmt: skip
        return choice.value

    alone = value(Queue())
    assert alone == pytest.approx(math.log(1.8 * 10 / 12))
    assert value(Queue(wait_s=0.004)) == pytest.approx(math.log(1.8 * 10 / 16))
    # load 2 / 12, job 2 ms, u = 0.5: l s / (2 (1 - u)) = 0.333 ms more wait for 100 rounds a second.
    assert value(Queue(utilisation=0.5, pressure=100.0)) == pytest.approx(alone - 0.1 / 3)


def test_requests_stand_for_their_neighbours() -> None:
    assert request_counts(4.0) == (2, 4, 6)
    assert request_counts(0.0) == (1, 1, 1)


def _report(target: str, model: str, rates: dict[int, float], trials: int) -> TargetReport:
    acceptance = {d: ExitAcceptance((rate,), (trials,)) for d, rate in rates.items()}
    return TargetReport(target, model, {1: 0.01}, acceptance)


def test_evidence_takes_only_what_is_new() -> None:
    evidence = Evidence(half_life_s=1e9)
    evidence.update(0.0, [_report("a", "m", {1: 0.8}, 100)])
    evidence.update(1.0, [_report("a", "m", {1: 0.8}, 100)])
    assert evidence.trials("m", 1) == pytest.approx(100.0)
    evidence.update(2.0, [_report("a", "m", {1: 0.8}, 130)])
    assert evidence.trials("m", 1) == pytest.approx(130.0)
    evidence.update(3.0, [_report("a", "m", {1: 0.2}, 40)])  # the worker restarted
    assert evidence.trials("m", 1) == pytest.approx(170.0)
    assert evidence.curves("m", (1,), 1)[1][0] == pytest.approx((130 * 0.8 + 40 * 0.2) / 170, abs=0.02)


def test_evidence_ages_and_depth_never_hurts() -> None:
    evidence = Evidence(half_life_s=10.0)
    evidence.update(0.0, [_report("a", "m", {1: 0.7, 4: 0.5}, 100)])
    low, high = (evidence.curves("m", (1, 4), 1)[d][0] for d in (1, 4))
    assert low == pytest.approx(high)
    evidence.update(10.0, [])
    assert evidence.trials("m", 1) == pytest.approx(50.0)


def test_evidence_that_counts_for_nothing_is_dropped() -> None:
    evidence = Evidence(half_life_s=10.0)
    evidence.update(0.0, [_report("a", "m", {1: 0.7}, 100), _report("b", "other", {1: 0.2}, 100)])
    evidence.update(200.0, [_report("b", "other", {1: 0.2}, 100)])
    assert evidence.trials("m", 1) > 0.0
    evidence.update(590.0, [_report("a", "m", {1: 0.7}, 100)])
    assert evidence.trials("m", 1) == 0.0
    assert [row["seen"] for row in evidence.export()["exits"]] == [{"a": 100}, {"b": 100}]
    evidence.update(900.0, [_report("a", "m", {1: 0.7}, 140)])
    assert evidence.trials("m", 1) == pytest.approx(40.0), "what is new only"
    assert [row["model"] for row in evidence.export()["exits"]] == ["m"]
    evidence.update(11_600.0, [])  # so small that a share of it would be nothing at all
    assert evidence.curves("m", (1,), 1) == {1: [0.5]}
    assert evidence.export()["exits"] == []


def test_a_model_borrows_from_others_by_its_own_quality() -> None:
    evidence = Evidence(half_life_s=1e9)
    others = [_report(f"t{i}", f"m{i}", {1: 0.5, 4: 0.75}, 400) for i in range(4)]
    evidence.update(0.0, [*others, _report("p", "poor", {1: 0.25}, 400), _report("n", "new", {}, 0)])
    # Nobody scored exit 4 of these: the others' ratio, 1.5, says what to expect.
    assert evidence.curves("new", (1, 4), 1)[4][0] == pytest.approx(0.75, abs=0.05)
    assert evidence.curves("poor", (1, 4), 1)[4][0] == pytest.approx(0.375, abs=0.06)


def _contender(
    name: str, cost: float, table: dict[int, list[tuple[float, float]]], **more: object
) -> Contender:
    """`table`: by depth, (value, load) of caps 1, 2, ..."""
    rows = {
        depth: [Choice(depth, k, math.exp(v), v, load) for k, (v, load) in enumerate(row, start=1)]
        for depth, row in table.items()
    }
    return Contender(name, "m", "d", cost, 1, 1.0, rows, **more)  # type: ignore[arg-type]


VALUES = st.floats(-0.5, 1.0)
TABLES = st.lists(st.tuples(VALUES, VALUES, VALUES), min_size=1, max_size=5)


@given(TABLES)
def test_the_sorted_plan_is_the_best_of_all_sorted_plans(rows: list[tuple[float, float, float]]) -> None:
    order = [
        _contender(f"t{i}", float(i), {d: [(v, 0.1)] for d, v in zip((1, 2, 4), row, strict=True)})
        for i, row in enumerate(rows)
    ]
    plan = sorted_plan(order, 1.0, 0.0)
    assert is_sorted(order, plan)
    options = [[OFF, *(c for row in t.table.values() for c in row if c.gain >= 1.0)] for t in order]
    best = max(
        sum(c.value for c in picks)
        for picks in itertools.product(*options)
        if is_sorted(order, dict(zip((t.target_id for t in order), picks, strict=True)))
    )
    assert sum(c.value for c in plan.values()) == pytest.approx(best)


def test_depth_goes_before_length_and_length_before_drafting() -> None:
    def order() -> list[Contender]:
        table = {1: [(0.3, 0.1), (0.4, 0.2)], 4: [(0.5, 0.3), (0.7, 0.6)]}
        return [_contender("a", 1.0, table), _contender("b", 2.0, table)]

    def after(limit: float) -> list[tuple[int, int]]:
        contenders = order()
        plan = sorted_plan(contenders, 1.0, 0.0)
        shed(contenders, plan, {"d": limit}, {"d": limit}, {"d": 100}, 1.0)
        assert loads(contenders, plan)["d"] <= limit + 1e-9
        return [(plan[t].exit, plan[t].length) for t in ("a", "b")]

    assert after(2.0) == [(4, 2), (4, 2)]
    assert after(1.0) == [(1, 2), (4, 2)], "the cheaper target goes to the shallower exit first"
    assert after(0.5) == [(1, 2), (1, 2)]
    assert sorted(after(0.31)) == [(1, 1), (1, 2)]
    assert sorted(after(0.11)) == [(0, 0), (1, 1)]


@settings(max_examples=60)
@given(
    st.lists(st.tuples(VALUES, VALUES, st.floats(0.05, 1.0)), min_size=1, max_size=8),
    st.floats(0.1, 2.0),
    st.integers(0, 7),
)
def test_shedding_fits_and_stays_sorted(
    rows: list[tuple[float, float, float]], limit: float, pinned: int
) -> None:
    order = []
    for i, (shallow, deep, load) in enumerate(rows):
        table = {1: [(shallow / 2, load / 4), (shallow, load / 2)], 4: [(deep / 2, load / 2), (deep, load)]}
        pin = Pin(exits=(1, 4)) if i == pinned else Pin()
        order.append(_contender(f"t{i}", float(i), table, pin=pin))
        order[-1].worker_id = f"d{i % 2}"
    plan = sorted_plan(order, 1.0, 0.0)
    limits = {"d0": limit, "d1": limit}
    shed(order, plan, limits, limits, {"d0": 100, "d1": 100}, 1.0)
    assert is_sorted(order, plan)
    assert all(load <= limit + 1e-9 for load in loads(order, plan).values())


def test_too_many_sessions_are_not_drafted_for() -> None:
    order = [_contender(f"t{i}", float(i), {1: [(0.1 * (i + 1), 0.01)]}) for i in range(3)]
    plan = sorted_plan(order, 1.0, 0.0)
    shed(order, plan, {"d": 1.0}, {"d": 1.0}, {"d": 2}, 1.0)
    assert [plan[f"t{i}"].length for i in range(3)] == [0, 1, 1]
