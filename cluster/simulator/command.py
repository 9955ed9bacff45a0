"""The comparison that `s2d simulate` runs: the router against what else the same hardware could do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.simulator.baselines import DraftPerModel, FixedExit, NoSpeculation
from cluster.simulator.profile import CostProfile
from cluster.simulator.scenario import Scenario
from cluster.simulator.simulation import Policy, RouterPolicy, RunResult, simulate

FIXED_LENGTHS = (2, 4)


def policies(profile: CostProfile) -> list[Policy]:
    """No speculation first: ratios refer to it."""
    fixed = [FixedExit(depth, length) for depth in sorted(profile.exits) for length in FIXED_LENGTHS]
    return [NoSpeculation(), RouterPolicy(), RouterPolicy(draft_ahead=True), DraftPerModel(), *fixed]


def compare(
    profile: CostProfile,
    scenario: Scenario,
    chosen: Sequence[Policy],
    progress: Callable[[str, float], None] = lambda name, seconds: None,
) -> list[RunResult]:
    """One run a policy; `progress` gets its name and the simulated seconds so far."""
    return [
        simulate(profile, scenario, policy, lambda now, name=policy.name: progress(name, now))  # type: ignore[misc]
        for policy in chosen
    ]
