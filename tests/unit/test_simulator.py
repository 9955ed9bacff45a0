"""The simulator: by hand in a small case, the same twice, and the router against what else could be done."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import geometric_mean

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from actors.engine.controller import Controller
from cluster.cli.main import app
from cluster.router.reports import Assignment, DraftReport, TargetReport
from cluster.router.router import Router
from cluster.simulator.baselines import DraftPerModel, FixedExit, NoSpeculation
from cluster.simulator.draft_pool import DraftJob, SimulatedDraftWorker
from cluster.simulator.events import Clock
from cluster.simulator.guesses import SessionGuesses
from cluster.simulator.profile import DEFAULT_PROFILE, CostProfile
from cluster.simulator.scenario import Scenario, arrivals, models_of
from cluster.simulator.simulation import RouterPolicy, RunResult, simulate
from cluster.simulator.target import Session, SimulatedTarget


def profile(**changes: object) -> CostProfile:
    """A round takes 10 ms + 1 ms a row, a draft token 1 ms at exit 1 and 3 ms at exit 4; no latency."""
    data: dict[str, object] = {
        "about": "for tests",
        "step_ms": {"x": {"1": 11.0, "11": 21.0}, "draft": {"1": 1.0, "8": 1.0}},
        "models": {"m": {"dtype": "x", "scale": 1.0, "acceptance": 1.0}},
        "draft_dtype": "draft",
        "exits": {"1": 1.0, "4": 3.0},
        "acceptance": {"chat": {"1": 0.0, "4": 0.0}},
        "acceptance_decay": 1.0,
        "latency_ms": 0.0,
    }
    return CostProfile.model_validate(data | changes)


def quiet(**changes: object) -> Scenario:
    return Scenario(**{"targets": 1, "replicas": 1, "noise": 0.0, "seed": 1} | changes)  # type: ignore[arg-type]


def one_target(costs: CostProfile, tokens: int, sessions: int, fixed: Assignment | None) -> tuple[float, int]:
    """(seconds until everything is emitted, rounds)."""
    clock = Clock()
    pool = {"d0": SimulatedDraftWorker(clock, costs.draft_s)}
    # A factor on acceptance that leaves it as it is.
    model = models_of(costs, quiet(quality=(1.0, 1.0)))[0]
    t = SimulatedTarget("t", model, costs, clock, random.Random(0), pool, 8, 6, 0.0)
    t.assignment = fixed
    for number in range(sessions):
        clock.after(0.0, partial(t.arrive, Session(number, "chat", tokens)))
    clock.run(60.0)
    assert t.emitted == tokens * sessions
    return t.busy_s, t.rounds


def test_plain_decoding_by_hand() -> None:
    # The first session runs alone for a round (11 ms); then two (12 ms); then the second one alone for its
    # last.
    assert one_target(profile(), 5, 1, None) == (pytest.approx(5 * 0.011), 5)
    assert one_target(profile(), 5, 2, None) == (pytest.approx(0.011 + 4 * 0.012 + 0.011), 6)


def test_drafts_that_are_never_right_are_given_up() -> None:
    seconds, rounds = one_target(profile(), 400, 1, Assignment("t", "d0", (1,), 4, ""))
    assert rounds == 400
    # The account bounds what drafting that never pays costs: 1 % of the time, and what was saved up at first.
    assert 400 * 0.011 < seconds < 400 * 0.011 * 1.01 + 0.1


def test_drafts_that_are_nearly_always_right_by_hand() -> None:
    costs = profile(acceptance={"chat": {"1": 0.95, "4": 0.95}})
    seconds, rounds = one_target(costs, 4000, 1, Assignment("t", "d0", (1,), 4, ""))
    # A full round emits 1 + .95 + .95^2 + .95^3 + .95^4 = 4.52 tokens in 4 + 15 ms.
    assert rounds == pytest.approx(4000 / 4.524, rel=0.04)
    assert seconds == pytest.approx(rounds * 0.019, rel=0.02)


def test_the_engines_own_controller_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plan = Controller.plan

    def spy(self: Controller, candidates: Sequence[object], other_rows: int = 0) -> list[int]:
        seen.append(len(candidates))
        return plan(self, candidates, other_rows)  # type: ignore[arg-type]

    monkeypatch.setattr(Controller, "plan", spy)
    one_target(profile(), 20, 2, Assignment("t", "d0", (1,), 4, ""))
    assert max(seen) == 2


def test_a_report_says_how_long_rounds_were_drafted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of four requests asks for four tokens, of an idle worker: 4 ms, and none of them is a wait."""

    def plan(self: Controller, candidates: Sequence[object], other_rows: int = 0) -> list[int]:
        return [4, 0, 0, 0][: len(candidates)]

    monkeypatch.setattr(Controller, "plan", plan)
    clock, costs = Clock(), profile()
    pool = {"d0": SimulatedDraftWorker(clock, costs.draft_s)}
    t = SimulatedTarget("t", models_of(costs, quiet())[0], costs, clock, random.Random(0), pool, 8, 6, 0.0)
    t.assignment = Assignment("t", "d0", (1,), 4, "")
    for number in range(4):
        clock.after(0.0, partial(t.arrive, Session(number, "chat", 1000)))
    clock.run(1.0)
    report = t.report(1.0)
    assert report.running == 4
    service = report.service
    assert (service.seconds, service.steps, service.tokens) == (pytest.approx(0.004), 4.0, 4.0)
    assert service.rounds_per_s == pytest.approx(report.rounds_per_s, abs=1.0)


def test_a_batch_runs_each_block_once_and_what_waits_goes_together() -> None:
    clock = Clock()
    w = SimulatedDraftWorker(clock, {1: {1: 1.0, 2: 1.5}, 4: {1: 3.0, 2: 4.0}})
    assert w.seconds([(1, 1, 1)]) == pytest.approx(1.0)
    assert w.seconds([(4, 1, 2)]) == pytest.approx(6.0)
    # Both through the first block (1.5), one on to exit 4 (3 - 1); then that one alone.
    assert w.seconds([(1, 1, 1), (4, 1, 2)]) == pytest.approx(1.5 + 2.0 + 3.0)
    ended: list[tuple[str, float]] = []

    def job(name: str) -> DraftJob:
        return DraftJob([(1, 1, 1)], lambda: ended.append((name, clock.now)))

    w.score(4, 1, lambda: ended.append(("shadow", clock.now)))
    w.ask(job("a"))
    w.ask(job("b"))
    w.score(1, 1, lambda: ended.append(("later shadow", clock.now)))
    clock.run(20.0)
    assert ended == [("shadow", 3.0), ("a", 4.5), ("b", 4.5), ("later shadow", 5.5)]
    assert w.total_busy_s == pytest.approx(5.5)


def with_ahead(costs: CostProfile, tokens: int) -> SimulatedTarget:
    """One session that is always drafted for with 4 tokens at exit 1, which a worker of its own prepares."""
    clock = Clock()
    model = models_of(costs, quiet(quality=(1.0, 1.0)))[0]
    pool = {"d0": SimulatedDraftWorker(clock, costs.draft_s)}
    t = SimulatedTarget("t", model, costs, clock, random.Random(0), pool, 8, 6, 0.0, draft_ahead=True)
    t.assignment = Assignment("t", "d0", (1,), 4, "")
    clock.after(0.0, partial(t.arrive, Session(0, "chat", tokens)))
    clock.run(120.0)
    assert t.emitted == tokens
    return t


def test_what_is_nearly_always_right_is_nearly_always_prepared() -> None:
    costs = profile(acceptance={"chat": {"1": 0.95, "4": 0.95}}, alternative=1.0)
    t = with_ahead(costs, 4000)
    # All accepted and the next guess right: 0.95^5; the first guess wrong, and its alternative right: 0.05.
    # Other verdicts are too unlikely to be prepared for. The target takes 15 ms, 9 steps of 1 ms do.
    share = t.prepared["foreseen"] / t.prepared.total()
    assert share == pytest.approx(0.95**5 + 0.05, abs=0.04)
    assert t.busy_s == pytest.approx(4000 / 4.524 * (0.015 + (1.0 - share) * 0.004), rel=0.04)


def test_a_draft_that_is_always_wrong_is_prepared_in_vain() -> None:
    t = with_ahead(profile(alternative=0.0), 400)
    assert t.prepared["foreseen"] == 0
    assert 400 * 0.011 < t.busy_s < 400 * 0.011 * 1.01 + 0.1


def test_preparing_yields_to_drafting() -> None:
    clock = Clock()
    w = SimulatedDraftWorker(clock, {1: {1: 1.0, 2: 1.5}})
    guesses = SessionGuesses({1: 0.9}, 1.0, 0.3, random.Random(0))
    assert guesses.known(1, 4) == 0
    assert len(guesses.answer(4)) == 4
    ended: list[float] = []
    w.prepare(guesses)
    clock.run(0.5)
    w.ask(DraftJob([(1, 1, 2)], lambda: ended.append(clock.now)))
    clock.run(50.0)
    assert ended == [3.0], "the step under way ends at 1 s, and no other one comes before the draft"
    assert w.total_busy_s == pytest.approx(2.0), "preparing does not count"
    assert guesses.next() is None


def test_drafts_of_their_own_take_turns() -> None:
    clock = Clock()
    w = SimulatedDraftWorker(clock, {1: {1: 1.0, 2: 1.5}}, batches=False)
    ended: list[float] = []
    for _ in range(3):
        w.ask(DraftJob([(1, 1, 1)], lambda: ended.append(clock.now)))
    clock.run(20.0)
    assert ended == [1.0, 2.0, 3.0]


def test_arrivals_are_the_same_for_all_and_as_many_as_asked() -> None:
    costs = CostProfile.from_file()
    scenario = Scenario(duration_s=600.0)
    models = models_of(costs, scenario)
    assert models[0] == models[1] != models[2]
    listed = arrivals(costs, scenario, models)
    assert listed == arrivals(costs, scenario, models)
    assert listed != arrivals(costs, Scenario(duration_s=600.0, seed=1), models)
    rates = [1.5 / 40.0 / costs.verify_s(m.size)[1] for m in models]
    assert len(listed) == pytest.approx(600.0 * sum(rates), rel=0.1)


SMALL = Scenario(targets=30, draft_workers=1, duration_s=60.0, warmup_s=25.0)


def test_equal_seeds_give_equal_results() -> None:
    costs, scenario = CostProfile.from_file(), SMALL.model_copy(update={"duration_s": 8.0, "warmup_s": 2.0})
    assert simulate(costs, scenario, RouterPolicy()) == simulate(costs, scenario, RouterPolicy())
    other = simulate(costs, scenario.model_copy(update={"seed": 5}), RouterPolicy())
    assert other != simulate(costs, scenario, RouterPolicy())


@pytest.mark.parametrize("warmup_s", [0.0, 0.5, 2.0])
def test_what_counts_begins_with_the_first_decision_after_the_warm_up(
    monkeypatch: pytest.MonkeyPatch, warmup_s: float
) -> None:
    emitted: dict[float, dict[str, int]] = {}
    targets: dict[str, SimulatedTarget] = {}
    report = SimulatedTarget.report

    def spy(self: SimulatedTarget, seconds: float) -> TargetReport:
        targets[self.target_id] = self
        emitted.setdefault(self._clock.now, {})[self.target_id] = self.emitted
        return report(self, seconds)

    monkeypatch.setattr(SimulatedTarget, "report", spy)
    scenario = SMALL.model_copy(update={"duration_s": 2.9, "warmup_s": warmup_s})
    result = simulate(CostProfile.from_file(), scenario, NoSpeculation())
    begin = min(at for at in emitted if at >= warmup_s)
    counted = sum(t.emitted for t in targets.values()) - sum(emitted[begin].values())
    assert result.tokens_per_s == pytest.approx(counted / (2.9 - begin))


@pytest.fixture(scope="module")
def runs() -> dict[str, RunResult]:
    costs = CostProfile.from_file()
    policies = [
        NoSpeculation(), RouterPolicy(), RouterPolicy(draft_ahead=True), DraftPerModel(),
        *(FixedExit(d, k) for d in costs.exits for k in (2, 4)),
    ]  # fmt: skip
    return {p.name: simulate(costs, SMALL, p) for p in policies}


def test_the_router_is_at_most_5_percent_worse_than_the_best_fixed_exit(runs: dict[str, RunResult]) -> None:
    """30 targets on one draft worker, 60 s of which 25 are warm-up. The best of eight fixed choices is known
    only afterwards."""
    fixed = [r for name, r in runs.items() if name.startswith("fixed")]
    assert len(fixed) == 8
    assert runs["router"].speed >= 0.95 * max(r.speed for r in fixed)
    assert runs["router"].speed >= 1.1 * runs["no speculation"].speed


def test_the_router_keeps_order_capacity_and_calm(runs: dict[str, RunResult]) -> None:
    router = runs["router"]
    settings = Router().settings
    assert router.unsorted == 0
    assert 0.0 < router.highest_plan <= settings.limit + settings.shadow_load
    assert router.changes_per_target_minute < 3.0


def test_drafting_ahead_spares_the_pool_time_and_slows_nobody_down(runs: dict[str, RunResult]) -> None:
    """What it gains here is within what single runs differ by: verification takes most of a round."""
    ahead, router = runs["router, draft-ahead"], runs["router"]
    costs, ratios = CostProfile.from_file(), [ahead.speed / router.speed]
    for seed in (1, 2):
        scenario = SMALL.model_copy(update={"seed": seed})
        both = [simulate(costs, scenario, RouterPolicy(draft_ahead=on)).speed for on in (True, False)]
        ratios.append(both[0] / both[1])
    assert geometric_mean(ratios) > 0.97
    assert ahead.utilisation < 0.9 * router.utilisation
    assert 0.0 < ahead.foreseen < 1.0
    assert router.foreseen == router.partly == 0.0
    settings = Router().settings
    assert ahead.unsorted == 0
    assert ahead.highest_plan <= settings.limit + settings.shadow_load


def test_an_order_that_is_broken_is_counted() -> None:
    class Upside(FixedExit):
        def step(
            self, now: float, targets: Sequence[TargetReport], drafts: Sequence[DraftReport]
        ) -> dict[str, Assignment]:
            order = sorted(targets, key=lambda t: t.cost_s_by_rows[1])
            return {
                t.target_id: Assignment(t.target_id, "d0", (8 if i < 10 else 1,), 2, "")
                for i, t in enumerate(order)
            }

    scenario = SMALL.model_copy(update={"duration_s": 2.0, "warmup_s": 0.0})
    assert simulate(CostProfile.from_file(), scenario, Upside(1, 2)).unsorted > 0


def test_the_command_writes_its_files(tmp_path: Path) -> None:
    arguments = ["simulate", "--targets", "10", "--duration", "6", "--warmup", "2", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "no speculation" in result.output
    document = json.loads((tmp_path / "simulate.json").read_text())
    assert document["scenario"]["targets"] == 10
    assert [r["policy"] for r in document["results"]][:2] == ["no speculation", "router"]
    assert "| router |" in (tmp_path / "simulate.md").read_text()
    assert (tmp_path / "simulate.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--targets", "0"], "targets: Input should be greater"),
        (["--duration", "5", "--warmup", "5"], "warmup_s: must be less"),
        (["--duration", "5.9", "--warmup", "5.5"], "warmup_s: must end by the last decision, at 5 s"),
        (["--profile", "nowhere.json"], "No such file"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["simulate", *arguments, "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert says in result.output


def test_an_own_profile_is_checked_and_used(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    mine = profile(models={"mine": {"dtype": "x", "scale": 2.0, "acceptance": 1.0}})
    file.write_text(mine.model_dump_json())
    arguments = ["simulate", "--targets", "2", "--duration", "3", "--warmup", "1", "--profile", str(file)]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "mine" in result.output
    with pytest.raises(ValidationError, match="no table for y"):
        profile(models={"m": {"dtype": "y", "scale": 1.0, "acceptance": 1.0}})
    with pytest.raises(ValidationError, match="one rate in"):
        profile(acceptance={"chat": {"1": 0.5}})


def test_the_shipped_profile_has_the_figures_of_the_documentation() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    # Rows of other machines come after those of the one that the profile was measured on.
    (shown,) = re.findall(r"^## Step of the engine\n(.*?)^## ", page, re.MULTILINE | re.DOTALL)
    for dtype, table in CostProfile.from_file(DEFAULT_PROFILE).step_ms.items():
        row = next(line for line in shown.splitlines() if line.startswith(f"| {dtype} | ") and "[" in line)
        minima = [float(cell.split("/")[0]) for cell in row.split("|")[2:9]]
        assert minima == list(table.values()), dtype
