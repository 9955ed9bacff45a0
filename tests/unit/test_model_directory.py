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
from ray import serve as ray_serve
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve._private.common import DeploymentStatus, DeploymentStatusTrigger, ReplicaState
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from actors.sampling.params import SamplingParams
from actors.target_worker.messages import GenerationRequest, TargetInfo
from cluster.cli.admin import CHANGE_TIMEOUT_S
from cluster.config import ClusterConfig, ModelConfig
from cluster.gateway import models_api
from cluster.gateway.errors import ApiError, not_ready
from cluster.gateway.generation import OPEN_CHOICES, run_job
from cluster.gateway.http_app import build_http_app
from cluster.gateway.in_flight import InFlight
from cluster.gateway.model_applications import SERVE_CALL_S, ModelApplications, _in_thread, _presence
from cluster.gateway.models import PROBE_TIMEOUT_S, ModelClient, ModelDirectory, Presence, ServedModel
from cluster.gateway.openai_params import Job
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
        self.leftovers: set[str] = set()
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.refused = 0

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
        self.loads.append(model.name)
        await asyncio.sleep(0.01)
        self.found[model.name] = Presence("starting")

    async def unload(self, name: str) -> bool:
        if self.away:
            self.refused += 1
            raise not_ready("Ray Serve does not answer")
        self.unloads.append(name)
        if name in self.leftovers:
            self.leftovers.remove(name)
            return True
        return self.found.pop(name, None) is not None


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


async def no_metrics() -> str:
    return ""


def operated(serve: FakeServe) -> httpx.AsyncClient:
    """Of a gateway whose models come and go."""
    gateway = Gateway(
        config=ClusterConfig.default().gateway.model_copy(update={"admin_endpoints": True}),
        directory=directory(serve),
        draft_pool=FakeDraftPool(),
        in_flight=InFlight(),
        loader=serve,
    )
    transport = httpx.ASGITransport(app=build_http_app(gateway, no_metrics))
    return httpx.AsyncClient(transport=transport, base_url="http://s2d")


async def test_loading_and_unloading_over_http() -> None:
    async with operated(FakeServe()) as client:
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


async def test_a_model_is_unloaded_after_what_runs_on_it() -> None:
    """Prompts of a long list that have not begun included: Serve answers none that waits for a worker."""
    serve = FakeServe()
    serve.found["guest"] = Presence("ready")
    guest = serve.sleepers["guest"] = Sleeper("guest")
    guest.awake.set()
    guest.hold = asyncio.Event()
    body = {"model": "guest", "prompt": ["x"] * (OPEN_CHOICES + 3), "max_tokens": 2}
    async with operated(serve) as client:
        running = asyncio.create_task(client.post("/v1/completions", json=body))
        await until(lambda: guest.running == OPEN_CHOICES)
        assert (await client.delete("/admin/models/guest")).json() == {"id": "guest", "state": "unloading"}
        assert (await client.post("/v1/completions", json=body)).status_code == 404
        assert "guest" not in {m["id"] for m in (await client.get("/v1/models")).json()["data"]}
        again = await client.post("/admin/models", json={"name": "guest", "source": "x"})
        assert (again.status_code, again.json()["error"]["code"]) == (409, "model_exists")
        assert (serve.unloads, len(guest.requests)) == ([], OPEN_CHOICES)
        guest.hold.set()
        answer = await running
        assert answer.status_code == 200
        assert [choice["text"] for choice in answer.json()["choices"]] == ["ab"] * (OPEN_CHOICES + 3)
        await until(lambda: serve.unloads == ["guest"])
        assert (await client.post("/admin/models", json={"name": "guest", "source": "x"})).status_code == 202


async def test_a_request_that_comes_while_its_model_is_retired_is_refused() -> None:
    """One that found the model a moment before: it would wait for a worker of what is being deleted."""
    target = FakeTarget("guest")
    model = ServedModel("guest", target)
    assert await model.in_flight.drain(1.0) == 0
    job = Job("j", "guest", 1, (GenerationRequest("r", SamplingParams(), "hi"),))
    with pytest.raises(ApiError) as refused:
        await anext(run_job(job, model, InFlight(), timeout_s=1.0, max_resumes=0))
    assert (refused.value.status, refused.value.code, target.requests) == (404, "model_not_found", [])


async def test_a_model_that_cannot_be_unloaded_stays() -> None:
    serve = FakeServe()
    serve.found["guest"] = Presence("ready")
    async with operated(serve) as client:
        assert (await client.get("/ready")).status_code == 200  # looks at Serve for the first time
        serve.away = True
        assert (await client.delete("/admin/models/guest")).status_code == 503
        serve.away = False
        assert (await client.delete("/admin/models/guest")).status_code == 202
    assert serve.unloads == ["guest"]


async def test_a_model_that_was_in_use_is_unloaded_once_serve_answers_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answer was sent, so that nobody would ask a second time."""
    monkeypatch.setattr(models_api, "UNLOAD_PAUSE_S", 0.01)
    serve = FakeServe()
    serve.found["guest"] = Presence("ready")
    guest = serve.sleepers["guest"] = Sleeper("guest")
    guest.awake.set()
    guest.hold = asyncio.Event()
    body = {"model": "guest", "prompt": "x", "max_tokens": 2}
    async with operated(serve) as client:
        running = asyncio.create_task(client.post("/v1/completions", json=body))
        await until(lambda: guest.running == 1)
        assert (await client.delete("/admin/models/guest")).status_code == 202
        serve.away = True
        guest.hold.set()
        assert (await running).status_code == 200
        await until(lambda: serve.refused > 1)
        assert (await client.post("/v1/completions", json=body)).status_code == 404
        serve.away = False
        await until(lambda: serve.unloads == ["guest"])


async def test_of_two_loads_of_one_name_one_is_refused() -> None:
    serve = FakeServe()
    guest = {"name": "guest", "source": "x"}
    async with operated(serve) as client:
        answers = await asyncio.gather(*(client.post("/admin/models", json=guest) for _ in range(2)))
    assert sorted(answer.status_code for answer in answers) == [202, 409]
    assert serve.loads == ["guest"]


async def test_what_was_loaded_before_the_configuration_had_its_name_can_be_unloaded() -> None:
    serve = FakeServe()
    serve.leftovers.add("steady")
    async with operated(serve) as client:
        answer = await client.delete("/admin/models/steady")
        assert (answer.status_code, answer.json()["id"]) == (202, "steady")
        assert answer.json()["state"] != "unloading", "the configured one stays"
        assert "steady" in {m["id"] for m in (await client.get("/v1/models")).json()["data"]}
        assert (await client.delete("/admin/models/steady")).status_code == 409


async def test_an_application_that_the_configuration_hides(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is no model, its log says so once, and unloading its name removes it."""
    name = ClusterConfig.default().models[0].name
    running = SimpleNamespace(
        status=ApplicationStatus.RUNNING, message="", deployments={}, last_deployed_time_s=1.0
    )
    there = {"s2d": running, application_name(name): running, application_name("guest"): running}
    deleted: list[str] = []

    def delete(application: str, _blocking: bool) -> None:
        assert not _blocking
        deleted.append(application)
        there[application] = SimpleNamespace(status=ApplicationStatus.DELETING)

    monkeypatch.setattr(ray_serve, "status", lambda: SimpleNamespace(applications=there))
    monkeypatch.setattr(ray_serve, "delete", delete)
    applications = ModelApplications(ClusterConfig.default())
    for _ in range(2):
        assert list(await applications.presences()) == ["guest"]
    assert [application_name(name) in record.getMessage() for record in caplog.records] == [True]
    assert await applications.unload(name)
    assert not await applications.unload(name)
    assert not await applications.unload("nobody")
    assert deleted == [application_name(name)]


def test_the_command_line_outwaits_what_a_change_may_take() -> None:
    """Two looks at Serve and two calls of it."""
    assert CHANGE_TIMEOUT_S > 2 * PROBE_TIMEOUT_S + 2 * SERVE_CALL_S


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
    served = SimpleNamespace(
        status=ApplicationStatus(application),
        message="",
        deployments={"target-m": deployment},
        last_deployed_time_s=5.0,
    )
    found = _presence(served, "target-m")
    assert found.state == state
    assert found.deployed_at == (5.0 if application == "RUNNING" else None), "until all workers are new"
    assert found.message == ("last line" if state == "failed" else "")


@pytest.mark.parametrize(
    ("status", "state"), [("RUNNING", "asleep"), ("DEPLOYING", "starting"), ("DEPLOY_FAILED", "failed")]
)
def test_presence_of_what_is_not_deployed_yet_is_its_applications(status: str, state: str) -> None:
    application = SimpleNamespace(
        status=ApplicationStatus(status), message="no such module", deployments={}, last_deployed_time_s=5.0
    )
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


async def test_a_model_that_was_changed_in_place_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two workers one is always there: the model never starts."""
    monkeypatch.setattr("cluster.gateway.models.PROBE_INTERVAL_S", 0.01)
    monkeypatch.setattr("cluster.gateway.models.DISCOVERY_INTERVAL_S", 0.0)
    serve = FakeServe()
    serve.found["guest"] = Presence("ready", deployed_at=1.0)
    models = directory(serve)
    worker = serve.sleepers["guest"] = Sleeper("guest")
    worker.awake.set()
    models.start()
    await until(lambda: "guest" in models.names() and models.find("guest").last_info is not None)
    serve.found["guest"] = Presence("ready")  # some of its workers are new
    await asyncio.sleep(0.05)
    assert worker.calls == 1
    serve.found["guest"] = Presence("ready", deployed_at=2.0)
    await until(lambda: worker.calls == 2)
    await asyncio.sleep(0.05)
    assert worker.calls == 2, "calls keep a model awake"
    assert models.find("guest").last_info is not None
    await models.close()


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
