"""Which draft worker serves which target: sticky, balanced by predicted load, one move at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def place(
    targets: Sequence[str],
    workers: Sequence[str],
    held: Mapping[str, str],
    pinned: Mapping[str, str],
    demand: Mapping[str, float],
) -> dict[str, str]:
    """A worker for each target; {} when there is none. Pins win where the worker lives; a held worker that
    lives stays; the others go, the greatest demand first, to the least loaded worker.

    `demand` is the load (draft-seconds a second) that a target would like to bring.
    """
    if not workers:
        return {}
    alive = set(workers)
    load = dict.fromkeys(workers, 0.0)
    placed: dict[str, str] = {}
    for target in targets:
        wish = pinned.get(target)
        wish = wish if wish in alive else held.get(target)
        if wish in alive and wish is not None:
            placed[target] = wish
            load[wish] += demand.get(target, 0.0)
    rest = sorted((t for t in targets if t not in placed), key=lambda t: (-demand.get(t, 0.0), t))
    count = dict.fromkeys(workers, 0)
    for worker in placed.values():
        count[worker] += 1
    for target in rest:
        worker = min(workers, key=lambda w: (load[w], count[w], w))
        placed[target] = worker
        load[worker] += demand.get(target, 0.0)
        count[worker] += 1
    return placed


def rebalance(
    placed: Mapping[str, str],
    workers: Sequence[str],
    movable: Sequence[str],
    demand: Mapping[str, float],
    gap: float,
) -> tuple[str, str] | None:
    """(target, new worker) of the one move that most evens out the fullest and the emptiest worker, or None
    while they differ by less than `gap`."""
    if len(workers) < 2:
        return None
    load = dict.fromkeys(workers, 0.0)
    for target, worker in placed.items():
        load[worker] += demand.get(target, 0.0)
    fullest = max(workers, key=lambda w: (load[w], w))
    emptiest = min(workers, key=lambda w: (load[w], w))
    excess = load[fullest] - load[emptiest]
    if excess < gap:
        return None
    candidates = [t for t in movable if placed[t] == fullest and 0.0 < demand.get(t, 0.0) < excess]
    if not candidates:
        return None
    return min(candidates, key=lambda t: (abs(demand[t] - excess / 2), t)), emptiest
