"""One target as the optimiser sees it: its place in the order, its choices, what it holds now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from cluster.router.goodput import OFF, Choice
from cluster.router.reports import Pin


@dataclass(slots=True)
class Contender:
    """`table[exit]` lists the choices of lengths 1, 2, ... that a pin allows. `cost_s` sorts. `held` is the
    present choice re-evaluated with today's figures, None for a newcomer. `may_change`: its dwell is over.
    `drafts_itself`: with a copy of its own, so that it loads no worker, and only exits that are pinned are
    chosen for it."""

    target_id: str
    model: str
    worker_id: str | None
    cost_s: float
    requests: int
    weight: float
    table: dict[int, list[Choice]] = field(default_factory=dict)
    pin: Pin = field(default_factory=Pin)
    held: Choice | None = None
    may_change: bool = True
    drafts_itself: bool = False

    @property
    def exempt(self) -> bool:
        """Pinned in exit or length: the sorted order does not bind it."""
        return self.pin.fixes_choice

    @property
    def must_draft(self) -> bool:
        return bool(self.pin.cap) and bool(self.table)

    def best(self, depth: int, min_gain: float, longest: int | None = None) -> Choice | None:
        """The best choice at one exit that is worth drafting, or none."""
        options = self.table.get(depth, [])
        if longest is not None:
            options = [c for c in options if c.length <= longest]
        top = max(options, key=lambda c: (c.value, -c.length), default=None)
        if top is None or (top.gain < min_gain and not self.must_draft):
            return None
        return top

    def same(self, depth: int, length: int) -> Choice | None:
        """A choice by exit and length, as evaluated now."""
        if length == 0:
            return OFF if not self.must_draft else None
        return next((c for c in self.table.get(depth, []) if c.length == length), None)


Plan = dict[str, Choice]
"""A choice by target id; `OFF` for a target that must not draft."""


def is_sorted(order: Sequence[Contender], plan: Plan) -> bool:
    """Whether depth never falls along the order, over the targets that draft and that it binds."""
    depths = [plan[c.target_id].exit for c in order if not c.exempt and plan[c.target_id].length > 0]
    return all(a <= b for a, b in pairwise(depths))


def loads(contenders: Sequence[Contender], plan: Plan) -> dict[str, float]:
    """Draft-seconds a second by worker."""
    total: dict[str, float] = {}
    for c in contenders:
        if c.worker_id is not None:
            total[c.worker_id] = total.get(c.worker_id, 0.0) + plan[c.target_id].load
    return total
