"""An overloaded worker gives up depth first, then length, before anybody queues.

Depth: the next shallower exit that still pays, for the worker's cheapest target at its depth; cheaper targets
of other workers that are as deep follow, so that the order stays sorted. Only when no target of the worker
has such an exit are lengths cut, one token at a time, down to none. Among possible steps the one that loses
least value for the load it frees is taken.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
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
    """Changes `plan` until each worker that is loaded above `start_above` is at `stop_at`, and no worker
    drafts for more requests than `sessions`. Pinned parts of a choice stay, so pins alone may exceed a
    limit."""
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
        steps = list(_depth_steps(order, worker, plan, min_gain))
        if not steps:
            return load
        _, _, moves = min(steps, key=lambda s: s[:2])
        for c, down in moves:
            if c.worker_id == worker:
                load -= plan[c.target_id].load - down.load
            plan[c.target_id] = down
            given_up.depth.add(c.target_id)
    return load


def _depth_steps(
    order: Sequence[Contender], worker: str, plan: Plan, min_gain: float
) -> Iterator[tuple[float, str, list[tuple[Contender, Choice]]]]:
    """(value lost per load freed, target, moves): one for each depth that targets of the worker have, and one
    for each exempt target."""
    drafting = [c for c in order if plan[c.target_id].length > 0]
    bound = [c for c in drafting if not c.exempt]
    seen: set[int] = set()
    for place, c in [*enumerate(bound), *((0, c) for c in drafting if c.exempt)]:
        now = plan[c.target_id]
        if c.worker_id != worker or (not c.exempt and now.exit in seen):
            continue
        if not c.exempt:
            seen.add(now.exit)
        down = _shallower(c, now, min_gain)
        if down is None:
            continue
        moves = [(c, down)]
        # Cheaper targets of other workers may be as deep: they follow, so that the order stays sorted.
        for other in () if c.exempt else bound[:place]:
            theirs = plan[other.target_id]
            if theirs.exit > down.exit:
                follow = _shallower(other, theirs, min_gain, deepest=down.exit)
                if follow is None:
                    break
                moves.append((other, follow))
        else:
            lost = sum(plan[x.target_id].value - choice.value for x, choice in moves)
            yield lost / (now.load - down.load), c.target_id, moves


def _shallower(c: Contender, now: Choice, min_gain: float, deepest: int | None = None) -> Choice | None:
    """The deepest choice below the present one that pays and frees load. A follower (with `deepest`) could be
    left in front of cheaper ones that are deeper than its new depth, so it goes exactly that deep."""
    depths = (d for d in c.table if d < now.exit and deepest in (None, d))
    for depth in sorted(depths, reverse=True):
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
    """(value lost per load freed, target, new length) of the next shorter length that pays, or none at
    all."""
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
