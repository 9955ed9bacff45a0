"""The sorted assignment: the best plan in which depth never falls with verification cost, by dynamic
programming.

best(i, d), the best value of the i cheapest targets with no depth above d, is
    max(best(i, d - 1), best(i - 1, d) + max(value of target i at d, value of not drafting)),
so the exact optimum over T targets and E exits takes T * E steps. A target that does not draft has no depth
and does not bind its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.router.goodput import OFF, Choice
from cluster.router.problem import Contender, Plan

_HOLD = 1e6
"""Value that keeps a choice which may not change, unless the order cannot be kept with it."""


def sorted_plan(order: Sequence[Contender], min_gain: float, change_cost: float, hold: bool = False) -> Plan:
    """Ignores capacity.

    Args:
        order: ascending verification cost.
        min_gain: what drafting must promise.
        change_cost: what a target must gain (in value, for weight 1) to leave the choice that it holds.
        hold: keep every held choice that the order allows; newcomers find their places between them.
    """
    plan: Plan = {}
    bound: list[Contender] = []
    for c in order:
        if c.exempt:
            plan[c.target_id] = _decide(c, None, min_gain, change_cost, hold)[1]
        else:
            bound.append(c)
    depths = sorted({depth for c in bound for depth in c.table})
    if not depths:
        return plan | {c.target_id: OFF for c in bound}
    best = [0.0] * len(depths)
    # chosen[i][d]: (index of the depth that the i cheapest may reach, choice of target i), if d is the bound
    chosen: list[list[tuple[int, Choice]]] = []
    for c in bound:
        values: list[float] = []
        row: list[tuple[int, Choice]] = []
        off = _decide(c, 0, min_gain, change_cost, hold)
        for index, depth in enumerate(depths):
            value, choice = max(off, _decide(c, depth, min_gain, change_cost, hold), key=lambda x: x[0])
            value, at = value + best[index], index
            if index and values[-1] >= value:
                value, (at, choice) = values[-1], row[-1]
            values.append(value)
            row.append((at, choice))
        best = values
        chosen.append(row)
    index = len(depths) - 1
    for c, row in zip(reversed(bound), reversed(chosen), strict=True):
        index, plan[c.target_id] = row[index]
    return plan


def _decide(
    c: Contender, depth: int | None, min_gain: float, change_cost: float, hold: bool
) -> tuple[float, Choice]:
    """Best (value, choice) of a target at one depth; 0: not drafting; None: at any."""
    if depth is None:
        options = [_decide(c, d, min_gain, change_cost, hold) for d in (0, *sorted(c.table))]
        return max(options, key=lambda x: x[0])
    if depth == 0:
        candidates = [OFF]
        if c.must_draft:
            return float("-inf"), OFF
    else:
        candidates = [x for x in (c.best(depth, min_gain),) if x is not None]
        if c.held is not None and c.held.exit == depth:
            candidates.append(c.held)
    if not candidates:
        return float("-inf"), OFF
    return max(((_worth(c, x, change_cost, hold), x) for x in candidates), key=lambda x: x[0])


def _worth(c: Contender, choice: Choice, change_cost: float, hold: bool) -> float:
    if c.held is None:
        return choice.value
    if (choice.exit, choice.length) == (c.held.exit, c.held.length):
        return choice.value + (_HOLD if hold or not c.may_change else 0.0)
    return choice.value - change_cost * c.weight
