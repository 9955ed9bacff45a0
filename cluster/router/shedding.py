"""An overloaded worker gives up depth first, then length, before anybody queues.

Depth: the next shallower exit that still pays, for the cheapest target at its depth, so that the order stays
sorted without touching others. Only when no target of the worker has such an exit are lengths cut, one token at a
time, down to none. Among possible steps the one that loses least value for the load it frees is taken.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.router.goodput import OFF, Choice
from cluster.router.problem import Contender, Plan

_ENOUGH = 1e-12


@dataclass(slots=True)
class Shed:
    """What was given up, for the reasons: target ids."""

    depth: set[str]
    length: set[str]


def shed(
    order: Sequence[Contender],
    plan: Plan,
    start_above: Mapping[str, float],
    stop_at: Mapping[str, float],
    sessions: Mapping[str, int],
    min_gain: float,
) -> Shed:
    """Changes `plan` until each worker that is loaded above `start_above` is at `stop_at`, and no worker drafts
    for more requests than `sessions`. Pinned parts of a choice stay, so pins alone may exceed a limit."""
    given_up = Shed(set(), set())
    for worker in sorted(start_above):
        mine = [c for c in order if c.worker_id == worker]
        load = sum(plan[c.target_id].load for c in mine)
        if load > start_above[worker]:
            load = _shed_depth(order, worker, plan, load, stop_at[worker], min_gain, given_up)
            _shed_length(mine, plan, load, stop_at[worker], min_gain, given_up)
        _fit_sessions(mine, plan, sessions[worker], given_up)
    return given_up


def _shed_depth(
    order: Sequence[Contender],
    worker: str,
    plan: Plan,
    load: float,
    stop_at: float,
    min_gain: float,
    given_up: Shed,
) -> float:
    while load > stop_at:
        steps: list[tuple[float, str, Choice]] = []
        floor = 0  # depth of the nearest cheaper target that drafts
        for c in order:
            now = plan[c.target_id]
            if now.length == 0:
                continue
            if c.worker_id == worker:
                down = _shallower(c, now, 0 if c.exempt else floor, min_gain)
                if down is not None:
                    price = (now.value - down.value) / (now.load - down.load)
                    steps.append((price, c.target_id, down))
            if not c.exempt:
                floor = now.exit
        if not steps:
            return load
        _, target_id, down = min(steps, key=lambda s: s[:2])
        load -= plan[target_id].load - down.load
        plan[target_id] = down
        given_up.depth.add(target_id)
    return load


def _shallower(c: Contender, now: Choice, floor: int, min_gain: float) -> Choice | None:
    for depth in sorted((d for d in c.table if floor <= d < now.exit), reverse=True):
        down = c.best(depth, min_gain, longest=now.length)
        if down is not None and down.load < now.load - _ENOUGH:
            return down
    return None


def _shed_length(
    mine: Sequence[Contender], plan: Plan, load: float, stop_at: float, min_gain: float, given_up: Shed
) -> None:
    of = {c.target_id: c for c in mine}
    heap = [step for c in mine if (step := _shorter(c, plan[c.target_id], min_gain)) is not None]
    heapq.heapify(heap)
    while load > stop_at and heap:
        _, target_id, length = heapq.heappop(heap)
        c = of[target_id]
        down = c.same(plan[target_id].exit, length)
        assert down is not None
        load -= plan[target_id].load - down.load
        plan[target_id] = down
        given_up.length.add(target_id)
        if (step := _shorter(c, down, min_gain)) is not None:
            heapq.heappush(heap, step)


def _shorter(c: Contender, now: Choice, min_gain: float) -> tuple[float, str, int] | None:
    """(value lost per load freed, target, new length) of the next shorter length that pays, or none at all."""
    if now.length == 0 or c.pin.cap is not None:
        return None
    for length in range(now.length - 1, 0, -1):
        down = c.same(now.exit, length)
        if down is not None and down.gain >= min_gain and down.load < now.load - _ENOUGH:
            return (now.value - down.value) / (now.load - down.load), c.target_id, length
    return now.value / max(now.load, _ENOUGH), c.target_id, 0


def _fit_sessions(mine: Sequence[Contender], plan: Plan, room: int, given_up: Shed) -> None:
    drafting = [c for c in mine if plan[c.target_id].length > 0]
    used = sum(c.requests for c in drafting)
    for c in sorted(drafting, key=lambda c: (plan[c.target_id].value / c.requests, c.target_id)):
        if used <= room:
            return
        if c.must_draft:
            continue
        plan[c.target_id] = OFF
        given_up.length.add(c.target_id)
        used -= c.requests
