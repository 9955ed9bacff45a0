"""How many draft workers: pure decisions, and what reaches Ray Serve."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.app import draft_pool_app
from cluster.config import ClusterConfig
from cluster.deployments.routing import Utilisation
from cluster.draft_scaling import TOLERANCE, UTILISATION, DraftPoolPolicy, desired_workers

shares = st.floats(0.0, 1.0)
pools = st.lists(shares, min_size=1, max_size=50)
targets = st.floats(0.05, 0.95)


@given(pools, targets)
def test_the_pool_that_is_wanted_stays(utilisation: list[float], target: float) -> None:
    """The same work on as many workers as were wanted makes nobody want another number."""
    work = sum(utilisation)
    count = max(1, round(desired_workers(utilisation, target)))
    each = min(1.0, work / count)
    again = desired_workers([each] * count, target)
    assert abs(again - count) <= max(1.0, TOLERANCE * count)


@given(pools, targets)
def test_more_work_never_wants_fewer(utilisation: list[float], target: float) -> None:
    more = [min(1.0, u + 0.2) for u in utilisation]
    assert desired_workers(more, target) >= desired_workers(utilisation, target) - 1e-9


@pytest.mark.parametrize(
    ("utilisation", "wanted"),
    [([0.6], 1.0), ([0.65], 1.0), ([1.0], 1 / 0.6), ([0.0, 0.0], 0.0), ([0.9, 0.9, 0.9, 0.9], 6.0)],
)
def test_examples(utilisation: list[float], wanted: float) -> None:
    assert desired_workers(utilisation, 0.6) == pytest.approx(wanted)


def context(reported: dict[str, float] | None, current: int, target: int) -> Any:
    metrics = None if reported is None else {UTILISATION: reported}
    return SimpleNamespace(
        aggregated_metrics=metrics, current_num_replicas=current, target_num_replicas=target
    )


def test_nothing_changes_before_every_worker_has_reported() -> None:
    policy = DraftPoolPolicy(0.5)
    assert policy(context(None, 1, 1)) == (1, {})
    assert policy(context({"a": 1.0}, 2, 2)) == (2, {})
    assert policy(context({"a": 1.0, "b": 1.0}, 2, 2)) == (4.0, {})


def test_utilisation_is_that_since_the_last_look() -> None:
    seen = Utilisation()
    seen.since_last(100.0, 5.0)
    assert seen.since_last(102.0, 6.0) == pytest.approx(0.5)
    assert seen.since_last(104.0, 6.0) == 0.0
    assert seen.since_last(104.0, 99.0) == 1.0


def test_serve_gets_the_policy() -> None:
    scaling = {"max_replicas": 3, "target_utilisation": 0.4}
    data: dict[str, Any] = {"models": [], "draft_pool": {"autoscaling": scaling}}
    config = ClusterConfig.model_validate(data)
    options: Any = draft_pool_app(config)._bound_deployment._deployment_config.autoscaling_config
    assert (options.min_replicas, options.max_replicas) == (1, 3)
    policy = options.policy.get_policy()
    assert options.policy.policy_kwargs == {"target_utilisation": 0.4}
    assert policy is DraftPoolPolicy
    assert config.draft_pool.most_replicas == 3
    for wrong, where in (
        ({"autoscaling": {}}, "max_replicas"),
        ({"autoscaling": {"max_replicas": 1, "min_replicas": 2}}, "max_replicas: must be at least"),
        ({"autoscaling": scaling, "replicas": 2}, "replicas: set by autoscaling"),
    ):
        with pytest.raises(ValidationError, match=where):
            ClusterConfig.model_validate(data | {"draft_pool": wrong})
