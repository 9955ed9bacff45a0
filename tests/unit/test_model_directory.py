"""Models that come, go and sleep: what the gateway's directory and the admin endpoints make of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve._private.common import DeploymentStatus, DeploymentStatusTrigger, ReplicaState
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from actors.target_worker.messages import TargetInfo
from cluster.config import ClusterConfig, ModelConfig
from cluster.gateway.errors import ApiError, not_ready
from cluster.gateway.generation import InFlight
from cluster.gateway.http_app import build_http_app
from cluster.gateway.model_applications import _in_thread, _presence
from cluster.gateway.models import ModelClient, ModelDirectory, Presence
from cluster.gateway.routes import Gateway
from cluster.model_apps import ModelAppConfig, application_name, build_model_app, model_of
from tests.unit.fake_target import FakeDraftPool, FakeTarget


class Sleeper(FakeTarget):
    """Answers once somebody wakes it; counts calls for its info."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.awake = asyncio.Event()
        self.calls = 0

    async def info(self) -> TargetInfo:
        self.calls += 1
        await self.awake.wait()
        return await super().info()


class FakeServe:
    """`ModelDiscovery` and `ModelLoader`."""

    def __init__(self) -> None:
        self.found: dict[str, Presence] = {}
        self.sleepers: dict[str, Sleeper] = {}
        self.away = False
        self.late: asyncio.Event | None = None

    async def presences(self) -> Mapping[str, Presence]:
        if self.away:
            raise not_ready("Ray Serve does not answer")
        found, late = dict(self.found), self.late
        if late is not None:  # what it was when asked, a while later
            await late.wait()
        return found

    def client(self, name: str) -> ModelClient:
        return self.sleepers.setdefault(name, Sleeper(name))

    async def load(self, model: ModelConfig) -> None:
        self.found[model.name] = Presence("starting")

    async def unload(self, name: str) -> None:
        del self.found[name]


def directory(serve: FakeServe, wake_timeout_s: float = 0.2) -> ModelDirectory:
    return ModelDirectory({"steady": FakeTarget("steady")}, serve, wake_timeout_s)


async def test_a_model_appears_falls_asleep_and_is_gone() -> None:
    serve = FakeServe()
    models = directory(serve)
    with pytest.raises(ApiError) as unknown:
        await models.ready_model("guest")
    assert (unknown.value.status, unknown.value.code) == (404, "model_not_found")
    serve.found["guest"] = Presence("starting")
    await models.refresh()
    with pytest.raises(ApiError) as starting:
        await models.ready_model("guest")
    assert (starting.value.status, starting.value.retry_after_s) == (503, 5.0)
    assert await models.unready() == [], "what is loaded takes nothing else out of service"
    serve.found["guest"] = Presence("asleep")
    await models.refresh()
    assert await models.unready() == []
    guest = serve.sleepers["guest"]
    assert guest.calls == 0, "nothing but a request may wake it"
    asyncio.get_running_loop().call_later(0.05, guest.awake.set)
    model, _ = await models.ready_model("guest")
    assert (model.name, model.state) == ("guest", "ready")
    await models.ready_model("guest")
    assert guest.calls == 1, "an awake model is not asked again"
    serve.found["guest"] = Presence("failed", "no such file")
    await models.refresh()
    with pytest.raises(ApiError, match=r"not ready \(failed: no such file\)"):
        await models.ready_model("guest")
    del serve.found["guest"]
    await models.refresh()
    assert models.names() == ["steady"]


async def test_a_model_that_does_not_wake_is_refused_after_the_wait() -> None:
    serve = FakeServe()
    serve.found["guest"] = Presence("asleep")
    models = directory(serve)
    began = asyncio.get_running_loop().time()
    with pytest.raises(ApiError, match=r"did not wake within 0\.2 s") as refused:
        await models.ready_model("guest")
    assert (refused.value.status, refused.value.retry_after_s) == (503, 10.0)
    assert 0.2 <= asyncio.get_running_loop().time() - began < 2.0


async def test_models_stay_while_serve_is_away() -> None:
    serve = FakeServe()
    serve.found["guest"] = Presence("ready")
    models = directory(serve)
    await models.refresh()
    serve.away = True
    await models.refresh()
    assert models.names() == ["steady", "guest"]
    assert models.find("guest").ready


async def test_loading_and_unloading_over_http() -> None:
    serve = FakeServe()
    gateway = Gateway(
        config=ClusterConfig.default().gateway.model_copy(update={"admin_endpoints": True}),
        directory=directory(serve),
        draft_pool=FakeDraftPool(),
        in_flight=InFlight(),
        loader=serve,
    )

    async def no_metrics() -> str:
        return ""

    transport = httpx.ASGITransport(app=build_http_app(gateway, no_metrics))
    async with httpx.AsyncClient(transport=transport, base_url="http://s2d") as client:
        guest = {"name": "org/guest", "source": "x"}
        answer = await client.post("/admin/models", json=guest)
        assert (answer.status_code, answer.json()) == (202, {"id": "org/guest", "state": "starting"})
        listed = {m["id"]: m for m in (await client.get("/v1/models")).json()["data"]}
        assert (listed["org/guest"]["state"], listed["org/guest"]["ready"]) == ("starting", False)
        state = next(m for m in (await client.get("/state")).json()["models"] if m["name"] == "org/guest")
        assert (state["replicas"], state["error"]) == ([], "starting")
        assert (await client.post("/admin/models", json=guest)).status_code == 409
        for body, param in (
            ({"name": "a", "source": "x", "replcas": 2}, "replcas"),
            ({"name": "a", "source": "x", "autoscaling": {"max_replicas": 0}}, "autoscaling.max_replicas"),
            ({"source": "x"}, "name"),
        ):
            refused = await client.post("/admin/models", json=body)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
        assert (await client.delete("/admin/models/org/guest")).status_code == 202
        assert (await client.delete("/admin/models/org/guest")).status_code == 404
        refused = await client.delete("/admin/models/steady")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_configured")


@given(st.text(min_size=1, max_size=40))
def test_application_names_hold_the_models(name: str) -> None:
    application = application_name(name)
    assert model_of(application) == name
    assert "/" not in application
    assert "#" not in application
    assert model_of("s2d") is None


def test_a_model_application_is_what_serve_deploys() -> None:
    config = ClusterConfig.default()
    model = config.models[0].model_copy(update={"name": "other"})
    joining = ModelAppConfig.joining(config, model)
    built = build_model_app(joining.model_dump(mode="json"))._bound_deployment
    assert built.name == "target-other"
    assert built.init_args[:2] == (model.model_dump(mode="json"), config.draft_pool.model_dump(mode="json"))
    application = {
        "name": application_name("other"), "import_path": "cluster.model_apps:build_model_app",
        "route_prefix": None, "args": joining.model_dump(mode="json"),
    }  # fmt: skip
    ServeDeploySchema.model_validate({"applications": [application]})


def test_autoscaling_reaches_serve() -> None:
    scaling = {"min_replicas": 0, "max_replicas": 3, "downscale_delay_s": 7}
    model = ModelConfig.model_validate({"name": "m", "source": "x", "autoscaling": scaling})
    options = build_model_app(ModelAppConfig(model=model))._bound_deployment._deployment_config
    assert options.autoscaling_config is not None
    found: Any = options.autoscaling_config
    assert (found.min_replicas, found.max_replicas, found.downscale_delay_s) == (0, 3, 7)
    assert found.target_ongoing_requests == model.engine.max_num_seqs / 2
    assert model.most_replicas == 3
    for wrong, where in (
        ({"min_replicas": 2}, "max_replicas: must be at least min_replicas"),
        ({"initial_replicas": 2}, "initial_replicas: must lie between"),
        ({"min_replica": 2}, "min_replica"),
    ):
        with pytest.raises(ValidationError, match=where):
            ModelConfig.model_validate({"name": "m", "source": "x", "autoscaling": wrong})
    with pytest.raises(ValidationError, match="replicas: set by autoscaling"):
        ModelConfig.model_validate({"name": "m", "source": "x", "replicas": 2, "autoscaling": scaling})


@pytest.mark.parametrize(
    ("application", "status", "trigger", "counts", "state"),
    [
        ("RUNNING", "HEALTHY", "AUTOSCALING", {"RUNNING": 1}, "ready"),
        ("UNHEALTHY", "UNHEALTHY", "REPLICA_STARTUP_FAILED", {"RUNNING": 1, "STARTING": 1}, "ready"),
        ("RUNNING", "HEALTHY", "DOWNSCALE_COMPLETED", {}, "asleep"),
        ("RUNNING", "UPSCALING", "AUTOSCALING", {"STARTING": 1}, "asleep"),
        ("RUNNING", "DOWNSCALING", "AUTOSCALING", {"STOPPING": 1}, "asleep"),
        ("DEPLOYING", "UPDATING", "CONFIG_UPDATE_STARTED", {"STARTING": 1}, "starting"),
        ("DEPLOY_FAILED", "DEPLOY_FAILED", "REPLICA_STARTUP_FAILED", {}, "failed"),
        ("UNHEALTHY", "UNHEALTHY", "HEALTH_CHECK_FAILED", {}, "failed"),
        # Others of the application fail or start.
        ("UNHEALTHY", "HEALTHY", "DOWNSCALE_COMPLETED", {}, "asleep"),
        ("DEPLOYING", "HEALTHY", "CONFIG_UPDATE_COMPLETED", {}, "asleep"),
        ("DEPLOY_FAILED", "UPSCALING", "AUTOSCALING", {"STARTING": 1}, "asleep"),
        ("DEPLOY_FAILED", "UPDATING", "CONFIG_UPDATE_STARTED", {"STARTING": 1}, "starting"),
    ],
)
def test_presence_as_serve_tells_it(
    application: str, status: str, trigger: str, counts: dict[str, int], state: str
) -> None:
    deployment = SimpleNamespace(
        status=DeploymentStatus(status),
        status_trigger=DeploymentStatusTrigger(trigger),
        replica_states={ReplicaState(name): count for name, count in counts.items()},
        message="one\nlast line",
    )
    found = _presence(
        SimpleNamespace(
            status=ApplicationStatus(application), message="", deployments={"target-m": deployment}
        ),
        "target-m",
    )
    assert found.state == state
    assert found.message == ("last line" if state == "failed" else "")


@pytest.mark.parametrize(
    ("status", "state"), [("RUNNING", "asleep"), ("DEPLOYING", "starting"), ("DEPLOY_FAILED", "failed")]
)
def test_presence_of_what_is_not_deployed_yet_is_its_applications(status: str, state: str) -> None:
    application = SimpleNamespace(status=ApplicationStatus(status), message="no such module", deployments={})
    found = _presence(application, "target-m")
    assert (found.state, found.message) == (state, "no such module" if state == "failed" else "")


@pytest.mark.parametrize(
    "error",
    [
        ActorDiedError(),
        RayTaskError("status", "secret", ValueError("secret"), ip="::1"),  # type: ignore[no-untyped-call]
    ],
)
async def test_a_controller_that_is_gone_is_a_503(error: Exception) -> None:
    def status() -> None:
        raise error

    with pytest.raises(ApiError, match="Ray Serve does not answer") as refused:
        await _in_thread(status)
    assert refused.value.status == 503
    assert "secret" not in refused.value.message


async def test_a_configured_model_that_may_sleep_counts_for_readiness() -> None:
    serve = FakeServe()
    serve.found["steady"] = Presence("asleep")
    models = directory(serve)
    await models.refresh()
    assert await models.unready() == []
    serve.found["steady"] = Presence("failed", "out of memory")
    await models.refresh()
    assert await models.unready() == ["steady"]
    models.forget("steady")
    assert models.names() == ["steady"], "only what was loaded can be forgotten"


async def test_one_call_wakes_a_model_for_all_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.gateway.models.MOST_WAITING", 20)
    serve = FakeServe()
    serve.found["guest"] = Presence("asleep")
    models = directory(serve, wake_timeout_s=5.0)
    await models.refresh()
    waiting = [asyncio.create_task(models.ready_model("guest")) for _ in range(20)]
    gone = asyncio.create_task(models.ready_model("guest"))
    await asyncio.sleep(0.01)
    with pytest.raises(ApiError) as refused:
        await gone
    assert (refused.value.status, refused.value.retry_after_s) == (429, 10.0)
    waiting[0].cancel()  # a client that leaves takes nobody along
    await asyncio.sleep(0)
    serve.sleepers["guest"].awake.set()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError)
    assert all(not isinstance(answer, BaseException) for answer in answers[1:])
    assert serve.sleepers["guest"].calls == 1


async def test_a_look_at_a_model_that_may_sleep_is_never_old(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = FakeServe()
    serve.found["guest"] = Presence("ready")
    models = directory(serve, wake_timeout_s=0.1)
    await models.refresh()
    serve.sleepers["guest"].awake.set()
    await models.ready_model("guest")
    serve.found["guest"] = Presence("asleep")
    serve.sleepers["guest"].awake.clear()
    monkeypatch.setattr("cluster.gateway.models.PROBE_INTERVAL_S", 0.0)
    with pytest.raises(ApiError, match="did not wake"):
        await models.ready_model("guest")


class Broken(FakeTarget):
    """Fails in ways that no client should."""

    error: BaseException | None = None

    async def info(self) -> TargetInfo:
        if self.error is not None:
            raise self.error
        return await super().info()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5.0):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def woken_guest() -> tuple[FakeServe, ModelDirectory]:
    """`guest` slept, and a request woke it."""
    serve = FakeServe()
    serve.found["guest"] = Presence("asleep")
    models = directory(serve)
    await models.refresh()
    serve.sleepers["guest"].awake.set()
    await models.ready_model("guest")
    return serve, models


@pytest.mark.parametrize("error", [RuntimeError("a bug"), asyncio.CancelledError()])
async def test_probing_survives_what_a_client_raises(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.gateway.models.PROBE_INTERVAL_S", 0.01)
    odd, well = Broken("odd"), FakeTarget("well")
    odd.error = error
    models = ModelDirectory({"odd": odd, "well": well})
    models.start()
    await until(lambda: models.find("well").ready)
    well.alive = False
    await until(lambda: not models.find("well").ready)
    assert not models.find("odd").ready
    odd.error = None
    await until(lambda: models.find("odd").ready)
    await models.close()


async def test_probing_survives_what_serve_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.gateway.models.PROBE_INTERVAL_S", 0.01)
    monkeypatch.setattr("cluster.gateway.models.DISCOVERY_INTERVAL_S", 0.0)
    serve = FakeServe()
    models = directory(serve)
    with monkeypatch.context() as broken:

        async def presences() -> Mapping[str, Presence]:
            raise ValueError("an answer that nobody understands")

        broken.setattr(serve, "presences", presences)
        models.start()
        await asyncio.sleep(0.05)
    await until(lambda: models.find("steady").ready)
    await models.close()


async def test_a_model_is_asked_for_its_info_once_when_it_becomes_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.gateway.models.PROBE_INTERVAL_S", 0.01)
    monkeypatch.setattr("cluster.gateway.models.DISCOVERY_INTERVAL_S", 0.0)
    serve = FakeServe()
    serve.found["guest"] = Presence("starting")
    models = directory(serve)
    models.start()
    await until(lambda: "guest" in models.names())
    guest, worker = models.find("guest"), serve.sleepers["guest"]
    worker.awake.set()
    await asyncio.sleep(0.05)
    assert worker.calls == 0, "one that starts would only answer later"
    serve.found["guest"] = Presence("ready")
    await until(lambda: guest.last_info is not None)
    await asyncio.sleep(0.05)
    assert worker.calls == 1, "calls keep a model awake"
    serve.found["guest"] = Presence("asleep")
    await until(lambda: guest.state == "asleep")
    assert guest.last_info is not None, "what sleeps is still described"
    serve.found["guest"] = Presence("starting")
    await until(lambda: guest.state == "starting")
    assert guest.last_info is None
    serve.found["guest"] = Presence("ready")
    await until(lambda: worker.calls == 2)
    await models.close()


async def test_a_redeployed_model_is_not_described_as_it_was() -> None:
    serve, models = await woken_guest()
    serve.found["guest"] = Presence("starting")
    await models.refresh()
    assert models.find("guest").last_info is None


async def test_a_model_that_was_woken_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.gateway.models.PROBE_INTERVAL_S", 0.01)
    serve, models = await woken_guest()
    serve.found["guest"] = Presence("ready")
    models.start()
    await asyncio.sleep(0.05)
    assert serve.sleepers["guest"].calls == 1
    await models.close()


async def test_what_was_unloaded_is_not_listed_by_an_older_look_at_serve() -> None:
    serve = FakeServe()
    serve.found["guest"] = Presence("ready")
    models = directory(serve)
    await models.refresh()
    serve.late = late = asyncio.Event()
    looking = asyncio.create_task(models.refresh())
    await asyncio.sleep(0)
    await serve.unload("guest")
    models.forget("guest")
    late.set()
    await looking
    assert models.names() == ["steady"]


async def test_an_older_look_at_serve_hides_nothing_that_a_later_one_found() -> None:
    serve = FakeServe()
    models = directory(serve)
    serve.late = late = asyncio.Event()
    looking = asyncio.create_task(models.refresh())
    await asyncio.sleep(0)
    serve.late = None
    serve.found["guest"] = Presence("starting")
    await models.refresh()
    late.set()
    await looking
    assert models.names() == ["steady", "guest"]
