"""Which exits are scored in shadow: those of which least is known, within a share of each worker's time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.router.evidence import Evidence
from cluster.router.goodput import cost_model
from cluster.router.problem import Contender, Plan
from cluster.router.reports import DraftReport, ShadowScoring, TargetReport
from cluster.router.settings import RouterSettings

_LEAST_ROUNDS = 0.1
"""Rounds a second that a target is taken to have at least."""


def plan_shadows(
    contenders: Sequence[Contender],
    plan: Plan,
    reports: Mapping[str, TargetReport],
    rounds_per_s: Mapping[str, float],
    workers: Mapping[str, DraftReport],
    evidence: Evidence,
    settings: RouterSettings,
) -> dict[str, ShadowScoring]:
    """One exit a target at most, the one with the least evidence among those not in use. Whose evidence is
    thinnest comes first, until `shadow_load` of its worker is spent. A target that an operator forbade to
    draft scores nothing. `rounds_per_s` is smoothed: who has no rounds now may have some in the coming
    second."""
    left = dict.fromkeys(workers, settings.shadow_load)
    wishes: list[tuple[float, str, Contender, int]] = []
    for c in contenders:
        worker = workers.get(c.worker_id) if c.worker_id is not None else None
        if worker is None or c.pin.cap == 0:
            continue
        others = [d for d in worker.exits if d != plan[c.target_id].exit]
        exit_depth = evidence.stalest(c.model, others)
        if exit_depth is not None:
            wishes.append((evidence.trials(c.model, exit_depth), c.target_id, c, exit_depth))
    shadows: dict[str, ShadowScoring] = {}
    for trials, target_id, c, exit_depth in sorted(wishes, key=lambda w: w[:2]):
        report, worker_id = reports[target_id], c.worker_id
        assert worker_id is not None
        length = min(settings.shadow_length, report.max_draft)
        step_s = cost_model(workers[worker_id].step_s_by_exit[exit_depth]).seconds(1)
        always = max(_LEAST_ROUNDS, rounds_per_s[target_id]) * length * step_s
        share = settings.first_shadow_share if trials < settings.shadow_trials else settings.shadow_share
        share = min(share, left[worker_id] / always) if always > 0.0 else 0.0
        if share <= 0.0:
            continue
        left[worker_id] -= share * always
        shadows[target_id] = ShadowScoring(exit_depth, length, share, share * always)
    return shadows
