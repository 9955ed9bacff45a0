"""The router in service: reports, when it decides, pins by name, restarts; its HTTP API and its command."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from pydantic import ValidationError
from typer.testing import CliRunner

from actors.draft_worker.batcher import BatcherState
from actors.drafting.assignment import DraftAssignment
from actors.drafting.interface import ServedRounds
from actors.drafting.nested import NestedDrafter
from actors.engine.async_engine import AsyncEngine
from actors.engine.messages import DraftingMeasurements, EngineRequest, EngineStats
from actors.sampling.params import SamplingParams
from cluster.cli.main import app
from cluster.config import ClusterConfig, DraftPoolConfig, RouterConfig, SpeculationConfig
from cluster.deployments.routing import DraftReports, TargetReports, TargetRouting
from cluster.gateway.http_app import build_http_app
from cluster.gateway.routes import Gateway
from cluster.named_actor import ActorUnavailableError
from cluster.router import service as service_module
from cluster.router.reports import Assignment, DraftService, ExitAcceptance, Pin, TargetReport
from cluster.router.service import SETTLE_INTERVALS, PinError, RouterService
from cluster.router.settings import RouterSettings
from tests.exactness.harness import make_engine, tiny_llama, torch_runner
from tests.unit.fake_target import FakeTarget, gateway
from tests.unit.test_router import key, target, worker


def started(
    reports: list[TargetReport] | None = None, service: RouterService | None = None, now: float = 0.0
) -> RouterService:
    """A service that has decided once, at `now` + 2."""
    service = service or RouterService()
    for at in (now, now + SETTLE_INTERVALS):
        service.report_draft(at, worker("d0"), 1.0)
        service.report_draft(at, worker("d1"), 1.0)
        for report in reports or [target("r1", model="m"), target("r2", model="m"), target("x")]:
            service.report_target(at, report, 1.0)
    return service


# When it decides, and on what.


def test_the_first_decision_waits_for_reports() -> None:
    service = RouterService()
    service.report_draft(0.0, worker("d0"), 1.0)
    assert service.report_target(0.0, target("x"), 1.0) is None
    assert service.report_target(1.0, target("x"), 1.0) is None
    decided = service.report_target(2.0, target("x"), 1.0)
    assert decided is not None
    assert (decided.target_id, decided.worker_id) == ("x", "d0")
    assert decided.cap > 0
    assert service.steps == 1
    assert service.report_target(2.5, target("x"), 1.0) == decided
    service.report_target(3.0, target("x"), 1.0)
    assert service.steps == 2
    service.report_target(3.3, target("x"), 0.2)
    service.report_target(3.4, target("x"), 0.2)
    assert service.steps == 3, "the interval is what reporters say"


def test_who_is_silent_is_gone() -> None:
    service = started()
    assert service.decisions.keys() == {"r1", "r2", "x"}
    service.report_target(8.0, target("x"), 1.0)
    assert service.decisions.keys() == {"x"}
    assert service.decisions["x"].assignment.worker_id is None
    assert "no draft worker" in service.decisions["x"].assignment.reason
    service.report_draft(8.5, worker("d1"), 1.0)
    assert service.report_target(9.0, target("x"), 1.0).worker_id == "d1"  # type: ignore[union-attr]
    service.forget_draft("d1")
    assert service.report_target(10.0, target("x"), 1.0).worker_id is None  # type: ignore[union-attr]


def test_a_step_that_fails_leaves_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    service = started()
    before = dict(service.decisions)

    def broken(*_: object) -> dict[str, Assignment]:
        raise ZeroDivisionError("no")

    monkeypatch.setattr(service._router, "step", broken)
    assert service.report_target(4.0, target("x"), 1.0) == before["x"].assignment
    assert service.view(4.0)["error"] == "ZeroDivisionError: no"
    monkeypatch.undo()
    service.report_target(6.0, target("x"), 1.0)
    assert service.view(6.0)["error"] is None


def test_reporters_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "MAX_REPORTERS", 2)
    service = RouterService()
    service.report_target(0.0, target("a"), 1.0)
    service.report_target(0.0, target("b"), 1.0)
    with pytest.raises(RuntimeError, match="2 workers"):
        service.report_target(1.0, target("c"), 1.0)
    service.report_target(7.0, target("c"), 1.0)


# Pins and restarts.


def test_pins_by_model_hold_for_every_replica_of_it() -> None:
    service = started()
    service.pin(2.5, "m", Pin(cap=0))
    caps = {t: (d.assignment.cap, d.assignment.cap_pinned) for t, d in service.decisions.items()}
    assert caps["r1"] == caps["r2"] == (0, True)
    assert caps["x"][0] > 0
    assert "pinned by an operator" in service.decisions["r1"].assignment.reason
    service.pin(2.6, "r2", Pin("d1", (2,), 3))  # a target's own pin comes first
    assert key(service.decisions["r2"].assignment) == ("d1", (2,), 3)
    service.report_target(3.7, target("r9", model="m"), 1.0)  # a replica that replaces another
    assert service.decisions["r9"].assignment.cap == 0
    service.unpin(3.8, "r2")
    assert service.decisions["r2"].assignment.cap == 0
    service.unpin(3.9, "m")
    rows = {row["target"]: row["pin"] for row in service.view(4.0)["targets"]}
    assert set(rows.values()) == {None}


@pytest.mark.parametrize(
    ("name", "pin", "field"),
    [
        ("nobody", Pin(cap=1), "target"),
        ("m", Pin("d7"), "worker"),
        ("m", Pin(exits=(3,)), "exits"),
        ("m", Pin("d0", (1, 99)), "exits"),
        ("m", Pin(cap=7), "cap"),
    ],
)
def test_pins_that_cannot_be_met_are_refused(name: str, pin: Pin, field: str) -> None:
    service = started()
    with pytest.raises(PinError) as refused:
        service.pin(2.5, name, pin)
    assert refused.value.field == field
    assert service.view(2.5)["pins"] == {}
    with pytest.raises(PinError):
        service.unpin(2.5, "m")


def test_pins_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "MAX_PINS", 2)
    service = started()
    for name in ("m", "x"):
        service.pin(2.5, name, Pin(cap=0))
    with pytest.raises(PinError, match="2 pins exist"):
        service.pin(2.5, "r1", Pin(cap=0))
    service.pin(2.5, "x", Pin(cap=1))
    service.unpin(2.5, "m")
    service.pin(2.5, "r1", Pin(cap=0))


def test_a_restarted_router_goes_on_where_it_stopped() -> None:
    service = started()
    service.pin(2.5, "m", Pin(exits=(2,)))
    saved = json.loads(json.dumps(service.export_state(), allow_nan=False))
    again = RouterService.restore(saved)
    assert again.view(3.0)["targets"][0]["reason"]
    # The first to report gets what was decided for it before anything new is decided.
    assert again.report_target(3.0, target("x"), 1.0) == service.decisions["x"].assignment
    assert again.steps == 0
    assert again.decisions.keys() == service.decisions.keys()
    twin = started(service=RouterService.restore(saved), now=4.0)
    assert twin.steps == 1
    assert {t: key(d.assignment) for t, d in twin.decisions.items()} == {
        t: key(d.assignment) for t, d in service.decisions.items()
    }
    assert all(d.changed_at <= 2.5 for d in twin.decisions.values()), "nothing changed"
    assert twin.view(7.0)["pins"] == {"m": {"worker": None, "exits": [2], "cap": None}}
    with pytest.raises(ValueError, match="version"):
        RouterService.restore({"version": 0})


def test_a_restarted_router_has_the_settings_of_today() -> None:
    service = started()
    service.pin(2.5, "m", Pin(exits=(2,)))
    saved = json.loads(json.dumps(service.export_state()))
    saved["router"]["settings"] = {"dwell_s": 99.0, "that_there_is_no_more": 1}  # as older ones were saved
    again = RouterService.restore(saved)
    assert again.view(3.0)["pins"] == {"m": {"worker": None, "exits": [2], "cap": None}}
    assert again._router.settings == RouterSettings()


# What workers report, and how they follow.


def stats(steps: int = 0, asked: int = 0, held: bool = False, **fields: Any) -> EngineStats:
    drafting = DraftingMeasurements(
        cost_s_by_rows={1: 0.01, 8: 0.012},
        acceptance_by_exit={2: ((0.5, 0.25), (40, 20))},
        asked_tokens=asked,
        served=ServedRounds(steps // 4, steps * 0.001, steps, 2 * steps),
        latency_s={"d0": 0.001},
        holds_draft=held,
    )
    return EngineStats(steps=steps, running=3, drafting=drafting, **fields)


def test_reports_of_a_target_are_what_its_engine_measured() -> None:
    reports = TargetReports("r1", "m", SpeculationConfig(max_draft_tokens=5))
    assert reports.build(9.0, EngineStats()) is None, "nothing is measured yet"
    first = reports.build(10.0, stats(steps=100, asked=50))
    assert first is not None
    assert (first.target_id, first.model, first.running, first.max_draft) == ("r1", "m", 3, 5)
    assert (first.rounds_per_s, first.draft_tokens_per_s) == (0.0, 0.0)
    assert first.acceptance == {2: ExitAcceptance((0.5, 0.25), (40, 20))}
    assert (first.latency_s, first.service, first.holds_draft) == ({"d0": 0.001}, DraftService(), False)
    second = reports.build(12.0, stats(steps=160, asked=150))
    assert second is not None
    assert (second.rounds_per_s, second.draft_tokens_per_s) == (30.0, 50.0)
    assert second.service == DraftService(7.5, pytest.approx(0.004), 4.0, 8.0)
    third = reports.build(13.0, stats(steps=160, asked=150, held=True))
    assert third is not None
    assert (third.service, third.holds_draft) == (DraftService(), True)
    dear = TargetReports("r1", "m", SpeculationConfig(weight=3.0)).build(1.0, stats())
    assert dear is not None
    assert dear.weight == 3.0
    off = TargetReports("r1", "m", SpeculationConfig(enabled=False)).build(1.0, stats())
    assert off is not None
    assert off.max_draft == 0


class Drafts:
    state = BatcherState(5, 2, 0, 0, 0, 10, 20, busy_s=0.0)

    def step_s_by_exit(self) -> dict[int, dict[int, float]]:
        return {2: {1: 0.001}, 4: {1: 0.002}}


def test_reports_of_a_draft_worker() -> None:
    pool = DraftPoolConfig.model_validate(
        {"drafters": ["nested"], "nested": {"source": "x", "exits": [2, 4]}, "max_sessions": 9}
    )
    drafts = Drafts()
    reports = DraftReports("d0", drafts, pool)
    at = time.monotonic()
    reports.build(at)
    drafts.state = replace(drafts.state, sessions=5, busy_s=drafts.state.busy_s + 0.5)
    report = reports.build(at + 2.0)
    assert (report.worker_id, report.exits, report.open_sessions, report.max_sessions) == ("d0", (2, 4), 5, 9)
    assert report.utilisation == pytest.approx(0.25)
    assert reports.build(at + 3.0).utilisation == 0.0


class InProcess:
    """A router in this process with a clock of its own, in place of the actor's client; `away`: it does not
    answer."""

    interval_s = 1.0

    def __init__(self, service: RouterService) -> None:
        self.service = service
        self.now = 2.0
        self.away = False

    def _answers(self) -> RouterService:
        if self.away:
            raise ActorUnavailableError("away")
        self.now += 1.0
        return self.service

    async def report_target(self, report: TargetReport) -> Assignment | None:
        service = self._answers()
        service.report_draft(self.now, worker("d0"), self.interval_s)
        return service.report_target(self.now, report, self.interval_s)

    async def view(self) -> dict[str, Any]:
        return self._answers().view(2.5)

    async def pin(self, target: str, pin: Pin) -> None:
        self._answers().pin(2.5, target, pin)

    async def unpin(self, target: str) -> None:
        self._answers().unpin(2.5, target)


class Worker:
    """A target worker's two methods, over a real engine."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.assigned: list[DraftAssignment] = []

    async def stats(self) -> EngineStats:
        return await self.engine.stats()

    def assign(self, assignment: DraftAssignment) -> None:
        self.assigned.append(assignment)
        self.engine.assign(assignment)

    async def obeyed(self) -> DraftAssignment:
        return (await self.engine.stats()).assignment


async def test_a_target_follows_and_keeps_the_last_assignment_without_a_router(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    nested = NestedDrafter(torch_runner(folder, 64), exits=(1, 2, 4))
    engine = AsyncEngine(make_engine(torch_runner(folder), [nested]), max_running=4, max_queued=4)
    target_worker = Worker(engine)
    router = InProcess(RouterService())
    reports = TargetReports("x", "x", SpeculationConfig())
    routing = TargetRouting(target_worker, router, reports, only_nested=True)  # type: ignore[arg-type]
    try:
        for _ in range(3):
            await routing.once()
        decided = router.service.decisions["x"].assignment
        assert (await target_worker.obeyed()).worker_id == decided.worker_id == "d0"
        router.service.pin(router.now, "x", Pin(exits=(2,), cap=3))
        await routing.once()
        obeyed = await target_worker.obeyed()
        assert (obeyed.exit_depth, obeyed.nested_cap, obeyed.cap) == (2, 3, 3)
        router.away = True
        told = len(target_worker.assigned)
        request = EngineRequest("r", (1, 2, 3), SamplingParams(max_tokens=12, seed=1))
        outputs = [output async for output in engine.generate(request)]
        assert sum(len(o.token_ids) for o in outputs) == 12
        await routing.once()
        assert await target_worker.obeyed() == obeyed
        assert len(target_worker.assigned) == told
        # A new router that knows nothing changes nothing until it has decided.
        router.away, router.service = False, RouterService()
        await routing.once()
        assert await target_worker.obeyed() == obeyed
        for _ in range(3):
            await routing.once()
        assert len(target_worker.assigned) == told + 1
    finally:
        assert await engine.close(5.0)


# For operators.


def serving(router: InProcess | None, **config: object) -> Gateway:
    served = gateway(FakeTarget(), **config)
    served.router = router
    return served


async def no_metrics() -> str:
    return ""


def http(served: Gateway) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(build_http_app(served, no_metrics), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.fixture
def router() -> InProcess:
    return InProcess(started([target("a#b#c", model="org/m")]))


@pytest.fixture
async def client(router: InProcess) -> AsyncIterator[httpx.AsyncClient]:
    async with http(serving(router, admin_endpoints=True)) as made:
        yield made


async def test_assignments_are_shown_and_pinned(client: httpx.AsyncClient) -> None:
    shown = (await client.get("/admin/router")).json()
    assert shown["running"]
    (row,) = shown["targets"]
    assert (row["target"], row["model"], row["pin"]) == ("a#b#c", "org/m", None)
    assert "predicted" in row["reason"]
    assert [w["worker"] for w in shown["workers"]] == ["d0", "d1"]
    assert sum(w["planned_load"] for w in shown["workers"]) == pytest.approx(
        row["load"] + row["shadow"]["load"]
    )

    answer = await client.put("/admin/router/pins/org/m", json={"exits": [2, 1], "cap": 2})
    assert answer.status_code == 200, answer.text
    assert answer.json()["pin"] == {"worker": None, "exits": [2, 1], "cap": 2}
    answer = await client.put("/admin/router/pins/a%23b%23c", json={"worker": "d1"})
    assert answer.status_code == 200, answer.text
    shown = (await client.get("/admin/router")).json()
    assert set(shown["pins"]) == {"org/m", "a#b#c"}
    assert shown["targets"][0]["worker"] == "d1"
    assert (await client.delete("/admin/router/pins/a%23b%23c")).status_code == 200
    assert (await client.delete("/admin/router/pins/org/m")).status_code == 200
    assert (await client.get("/admin/router")).json()["pins"] == {}


@pytest.mark.parametrize(
    ("name", "body", "status", "param"),
    [
        ("nobody", {"cap": 1}, 404, "target"),
        ("org/m", {"worker": "d9"}, 400, "worker"),
        ("org/m", {"worker": 3}, 400, "worker"),
        ("org/m", {"worker": ""}, 400, "worker"),
        ("org/m", {"exits": [3]}, 400, "exits"),
        ("org/m", {"exits": []}, 400, "exits"),
        ("org/m", {"exits": [0]}, 400, "exits.0"),
        ("org/m", {"cap": -1}, 400, "cap"),
        ("org/m", {"cap": 7}, 400, "cap"),
        ("org/m", {"cap": "2"}, 400, "cap"),
        ("org/m", {"depth": 2}, 400, "depth"),
        ("org/m", {}, 400, None),
    ],
)
async def test_bad_pins_name_the_field(
    client: httpx.AsyncClient, name: str, body: object, status: int, param: str | None
) -> None:
    answer = await client.put(f"/admin/router/pins/{name}", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    answer = await client.delete("/admin/router/pins/org/m")
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "target")


async def test_models_say_who_drafts_for_them(router: InProcess) -> None:
    def served(router: InProcess | None) -> httpx.AsyncClient:
        both = gateway(FakeTarget("org/m"), FakeTarget("org/n"))
        both.router = router
        return http(both)

    async with served(router) as client:
        (row,) = (await client.get("/admin/router")).json()["targets"]
        models = {m["id"]: m["draft"] for m in (await client.get("/v1/models")).json()["data"]}
        short = {name: row[name] for name in ("target", "worker", "exits", "cap")}
        assert models == {"org/m": [short | {"alive": True}], "org/n": []}
        assert (await client.get("/v1/models/org/m")).json()["draft"] == models["org/m"]
        router.service.forget_draft(row["worker"])
        assert (await client.get("/v1/models/org/m")).json()["draft"] == [short | {"alive": False}]
        router.away = True
        assert (await client.get("/v1/models/org/m")).json()["draft"] is None
    async with served(None) as client:
        assert (await client.get("/v1/models/org/m")).json()["draft"] is None


async def test_pins_are_guarded_and_a_router_may_be_away_or_off(router: InProcess) -> None:
    async with http(serving(router)) as made:
        assert (await made.get("/admin/router")).status_code == 200
        assert (await made.put("/admin/router/pins/org/m", json={"cap": 1})).status_code in (404, 405)
        assert (await made.delete("/admin/router/pins/org/m")).status_code in (404, 405)
        router.away = True
        away = await made.get("/admin/router")
        assert (away.status_code, away.headers["retry-after"]) == (503, "1")
    async with http(serving(None, admin_endpoints=True)) as made:
        off = (await made.get("/admin/router")).json()
        assert not off["running"]
        assert "nested" in off["why"]
        assert (await made.put("/admin/router/pins/m", json={"cap": 1})).status_code == 409
    async with http(serving(router, api_key="secret")) as made:
        assert (await made.get("/admin/router")).status_code == 401


@contextmanager
def listening(served: Gateway) -> Iterator[str]:
    config = uvicorn.Config(build_http_app(served, no_metrics), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=asyncio.run, args=(server.serve(),), daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive()
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10.0)


def s2d(url: str, *args: str) -> tuple[int, str]:
    first, *rest = args or ("",)
    command = ["router", *filter(None, [first]), *rest, "--url", url]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert "Traceback" not in result.output
    return result.exit_code, result.output


def test_the_command_shows_and_pins(router: InProcess) -> None:
    with listening(serving(router, admin_endpoints=True)) as url:
        code, text = s2d(url)
        assert code == 0
        assert all(word in text for word in ("a#b#c", "d0", "Assignments", "Draft workers"))
        code, text = s2d(url, "--json")
        assert json.loads(text)["targets"][0]["model"] == "org/m"
        assert s2d(url, "pin", "a#b#c", "--worker", "d1", "--exit", "1", "--exit", "2", "--cap", "3")[0] == 0
        assert router.service.view(3.0)["pins"] == {"a#b#c": {"worker": "d1", "exits": [1, 2], "cap": 3}}
        assert "Pins" in s2d(url)[1]
        assert s2d(url, "unpin", "a#b#c")[0] == 0
        for args, said in (
            (("pin", "nobody", "--cap", "1"), "nobody"),
            (("pin", "org/m", "--exit", "3"), "exits"),
            (("pin", "org/m"), "at least one"),
            (("unpin", "org/m"), "not pinned"),
        ):
            code, text = s2d(url, *args)
            assert code == 1
            assert said in text
    with listening(serving(router)) as url:
        code, text = s2d(url, "pin", "org/m", "--cap", "1")
        assert code == 1
        assert "admin_endpoints" in text
    with listening(serving(None)) as url:
        assert "no router runs" in s2d(url)[1]


def test_configuration() -> None:
    nested = {"drafters": ["nested"], "nested": {"source": "x", "exits": [2]}}
    models = [{"name": "m", "source": "x"}]
    assert ClusterConfig.model_validate({"models": models}).routed is None, "there is nothing to assign"
    config = ClusterConfig.model_validate({"models": models, "draft_pool": nested})
    assert config.routed == RouterConfig(enabled=True, interval_s=1.0)
    for off in ({"router": {"enabled": False}}, {"draft_pool": nested | {"replicas": 0}}):
        assert ClusterConfig.model_validate({"models": models, "draft_pool": nested} | off).routed is None
    for bad in ({"intervall_s": 1}, {"interval_s": 0}):
        with pytest.raises(ValidationError):
            RouterConfig.model_validate(bad)
