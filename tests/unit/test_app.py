"""The Serve application: names, resources, limits; leases and metrics beside it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private import constants
from ray.serve.deployment import Application
from ray.serve.schema import ServeDeploySchema

from cluster.app import GRPC_HEALTH, GRPC_SERVICER, build_app, serve_options
from cluster.cli.local_cluster import RAY_ENVIRONMENT
from cluster.config import ClusterConfig, GatewayConfig
from cluster.model_apps import (
    APP_NAME,
    ModelAppConfig,
    _ongoing_limit,
    build_model_app,
    deployment_name,
    thread_env,
)
from cluster.registry import MAX_LEASES, Lease, LeaseTable
from cluster.telemetry.collect import collect, merge


def parts(app: Application) -> tuple[Any, dict[str, Any], Any]:
    """Gateway, targets by model name, draft pool (deployments)."""
    gateway = app._bound_deployment
    _, targets, pool = gateway.init_args
    return (
        gateway,
        {name: target._bound_deployment for name, target in targets.items()},
        pool and pool._bound_deployment,
    )


def test_default_application_fits_two_cores() -> None:
    gateway, targets, pool = parts(build_app(ClusterConfig.default()))
    assert (gateway.name, pool.name) == ("gateway", "draft-pool")
    assert [t.name for t in targets.values()] == ["target-SmolLM2-135M-Instruct"]
    cpus = sum(d.ray_actor_options["num_cpus"] for d in (gateway, pool, *targets.values()))
    assert cpus <= 2.0


def test_builder_takes_plain_data_and_targets_know_only_their_model() -> None:
    data = {"models": [{"name": n, "source": f"/{n}", "replicas": 2} for n in ("a", "b")]}
    _, targets, pool = parts(build_app(data))
    assert set(targets) == {"a", "b"}
    assert all(t.num_replicas == 2 for t in targets.values())
    assert '"/b"' not in str(targets["a"].init_args).replace("'", '"')
    alone = parts(build_app({"models": data["models"][:1]}))[1]["a"]
    assert alone.init_args == targets["a"].init_args
    assert pool is not None


def test_no_draft_pool() -> None:
    data = {"models": [{"name": "a", "source": "x"}], "draft_pool": {"replicas": 0}}
    assert parts(build_app(data))[2] is None


def test_limits_leave_refusals_to_the_engine() -> None:
    config = ClusterConfig.default()
    gateway, targets, _ = parts(build_app(config))
    engine = config.models[0].engine
    target = next(iter(targets.values()))
    assert target.max_ongoing_requests == _ongoing_limit(config.models[0])
    assert target.max_ongoing_requests > engine.max_num_seqs + engine.max_queued
    assert gateway.max_ongoing_requests > target.max_ongoing_requests
    env = target.ray_actor_options["runtime_env"]["env_vars"]
    assert env["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "OMP_NUM_THREADS" not in env
    assert thread_env(3)["OMP_NUM_THREADS"] == "3"


@given(st.text(min_size=1), st.text(min_size=1))
def test_deployment_names_are_valid_and_distinct(one: str, other: str) -> None:
    names = deployment_name(one), deployment_name(other)
    assert (names[0] == names[1]) == (one == other)
    assert all("#" not in n and "/" not in n and n.isascii() for n in names)


def test_serve_config_is_accepted_by_ray() -> None:
    options = serve_options(ClusterConfig.default())
    assert options["grpc_options"]["grpc_servicer_functions"] == [GRPC_SERVICER, GRPC_HEALTH]
    application = {"name": APP_NAME, "import_path": "cluster.app:build_app", "route_prefix": "/"}
    args = ClusterConfig.default().model_dump(mode="json")
    ServeDeploySchema.model_validate({**options, "applications": [{**application, "args": args}]})


def test_proxies_outwait_a_request_that_wakes_its_model() -> None:
    data = {"gateway": {"cold_start_timeout_s": 50, "request_timeout_s": 70}}
    options = serve_options(ClusterConfig.model_validate(ClusterConfig.default().model_dump() | data))
    for proxy in ("http_options", "grpc_options"):
        assert options[proxy]["request_timeout_s"] > 120


def test_messages_between_processes_are_bounded_by_the_proxies_alone() -> None:
    """Ray Serve knows the variables that `s2d serve` sets, and a body of any allowed size gets through."""
    assert all(hasattr(constants, name) for name in RAY_ENVIRONMENT if name.startswith("RAY_SERVE_"))
    limit = int(RAY_ENVIRONMENT["RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"])
    assert limit == constants.RAY_SERVE_GRPC_MAX_MESSAGE_SIZE > 100 * GatewayConfig().max_body_bytes


def test_unloading_a_model_waits_for_what_runs_on_it() -> None:
    data = {"gateway": {"request_timeout_s": 70}}
    config = ClusterConfig.model_validate(ClusterConfig.default().model_dump() | data)
    args = ModelAppConfig.joining(config, config.models[0]).model_dump(mode="json")
    built = build_model_app(args)._bound_deployment
    assert built._deployment_config.graceful_shutdown_timeout_s == 70


def test_a_change_cuts_no_request_short() -> None:
    """Old workers and the old gateway are left the time that a request may take, the gateway also that in
    which it wakes a model; the new gateway is there before the old one refuses anything."""
    data = {"gateway": {"cold_start_timeout_s": 50, "request_timeout_s": 70}}
    gateway, targets, _ = parts(build_app(ClusterConfig.default().model_dump() | data))
    assert [t._deployment_config.graceful_shutdown_timeout_s for t in targets.values()] == [70]
    assert gateway._deployment_config.graceful_shutdown_timeout_s == 120
    assert (gateway.num_replicas, gateway._deployment_config.max_surge_percent) == (1, 100)


def test_leases_expire_unless_renewed() -> None:
    now = 0.0
    table = LeaseTable(ttl_s=3.0, clock=lambda: now)
    table.renew(Lease("a", "1", "h:1"))
    table.renew(Lease("b", "1", "h:2"))
    now = 2.0
    table.renew(Lease("a", "2", "h:3", load=2.0))
    now = 3.5
    assert table.living() == [Lease("a", "2", "h:3", load=2.0)]
    table.release("a", "1")
    assert table.living()
    table.release("a", "2")
    table.release("nobody", "1")
    assert table.living() == []


def test_lease_table_is_bounded() -> None:
    table = LeaseTable()
    for i in range(MAX_LEASES):
        table.renew(Lease(str(i), "1", "h:1"))
    table.renew(Lease("5", "2", "h:1"))
    with pytest.raises(RuntimeError):
        table.renew(Lease("more", "1", "h:1"))


def test_merge_keeps_metrics_together() -> None:
    one = "# HELP a A\n# TYPE a counter\na 1\n# TYPE b gauge\nb 2\n"
    other = "# HELP a A\n# TYPE a counter\na 3\n"
    assert merge([one, other, ""]) == "# HELP a A\n# TYPE a counter\na 1\na 3\n# TYPE b gauge\nb 2\n"
    assert merge([]) == ""


async def test_collect_survives_nodes_that_are_down() -> None:
    assert await collect(["http://127.0.0.1:1/metrics"], timeout_s=1.0) == ""
