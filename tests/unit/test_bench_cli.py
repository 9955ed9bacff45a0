"""`s2d bench`: options, settings, the registry of engines, the environment's record."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from cluster.bench import environment as environments
from cluster.bench.config import LoadSettings, ProfileSettings, SpecSettings
from cluster.bench.engines.interface import EngineUnavailableError
from cluster.bench.engines.openai_endpoint import OpenAIEndpoint
from cluster.bench.engines.peer_engine import PeerEngine
from cluster.bench.engines.registry import FACTORIES, EngineContext, create
from cluster.bench.engines.s2d import S2DEngine
from cluster.bench.running import BenchError
from cluster.bench.session import measure_profile, server_config
from cluster.cli.main import app
from cluster.config import ClusterConfig

runner = CliRunner()
ROOT = Path(__file__).resolve().parents[2]
STAND_INS = """
import signal
import time

import cluster.bench.choice.record as record
import cluster.bench.step.command as step
from cluster.bench.step.times import StepTimes
from cluster.cli.main import app


def go_on_for_ever():
    print("measuring", flush=True)
    while True:
        time.sleep(0.05)


def measure_steps(dtype, settings, keep, advance, say):
    keep.append(StepTimes(dtype, "none", "none", 1, 0, rows_s={1: [0.1]}))
    advance()
    go_on_for_ever()


step.measure_steps = measure_steps
step.environment = dict
record.record_trace = lambda settings, say: go_on_for_ever()
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
app()
"""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["spec", "--dataset", "spec-bench"], "path: required by"),
        (["spec", "--dataset", "mine"], "dataset: Input should be"),
        (["spec", "-e", "s2d-plain", "--baseline", "s2d-auto"], "baseline: 's2d-auto' is not one of"),
        (["spec", "-e", "s2d-plain", "-e", "s2d-plain"], "engines: names must be unique"),
        (["spec", "-e", "nobody"], "unknown engine 'nobody'; known: s2d-plain"),
        (["spec", "-e", "x=ftp://y"], "use NAME=URL"),
        (["load", "--rate", "-1"], "rate: must be positive"),
        # Before the questions are read.
        (
            ["load", "-e", "hf", "--concurrency", "257", "--dataset", "spec-bench", "--path", "nowhere"],
            "hf takes at most 256 requests at once, not 257",
        ),
        (["load", "--dtype", "float7"], "dtype: Input should be"),
        (["spec", "--dataset", "spec-bench", "--path", "nowhere.jsonl"], "No such file"),
        (["step", "--dtype", "float7"], "dtypes.0: Input should be"),
        (["step", "--rows", "8", "--rows", "8"], "rows: each value once"),
        (["step", "--context", "128", "--context", "256"], "contexts: a fit needs 4 lengths"),
        (["step", "--rows", "0"], "rows: must be at least 1"),
        (["soak", "--limit", "0"], "limit: Input should be greater than 0"),
        (["soak", "--config", "nowhere.yaml"], "No such file"),
        (["start", "--config", "nowhere.yaml"], "No such file"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, arguments: list[str], says: str) -> None:
    # A folder with a model is not needed: all of this is found before.
    result = runner.invoke(app, ["bench", *arguments, "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert says in result.output
    assert "Traceback" not in result.output


def test_help_names_the_commands_and_options() -> None:
    assert all(
        word in runner.invoke(app, ["bench", "--help"]).output
        for word in ("spec", "load", "step", "soak", "start")
    )
    text = runner.invoke(app, ["bench", "load", "--help"], env={"COLUMNS": "200"}).output
    for option in ("--engine", "--concurrency", "--rate", "--pairs", "--slo-tpot-ms", "--out", "--seed"):
        assert option in text


def test_settings_refuse_unknown_fields_and_size_the_engines() -> None:
    with pytest.raises(ValidationError, match="enginse"):
        SpecSettings.model_validate({"enginse": ("a",)})
    settings = LoadSettings(engines=("a", "b=http://h"), concurrency=(1, 32), slo_tpot_ms=40.0)
    assert settings.names == ("a", "b")
    assert settings.baseline_name == "a"
    assert settings.concurrency_limit == 32
    assert settings.slo.tpot_s == pytest.approx(0.04)
    assert settings.slo.ttft_s is None
    assert LoadSettings(concurrency=(1,), rate=(2.0,)).concurrency_limit == 64
    assert SpecSettings().concurrency_limit == 1


def context(**fields: Any) -> EngineContext:
    config = server_config(SpecSettings(dtype="float32"))
    return EngineContext(Path(), config.models[0].source, "float32", config, **fields)


def test_engines_of_one_set_of_drafters_share_a_server() -> None:
    shared = context(concurrency=24, threads=1)
    for name in FACTORIES:
        assert create(name, shared).name == name
    plain, nested = shared.server("model-free"), shared.server("nested")
    assert nested is shared.server() is shared.server(), "the default pool has the trained draft"
    assert plain is shared.server("model-free")
    assert plain is not nested
    assert plain._config.draft_pool.drafters == ("prompt_lookup", "token_recycling")
    assert nested._config.draft_pool.drafters == ("prompt_lookup", "token_recycling", "nested")
    engine = plain._config.models[0].engine
    assert (engine.max_num_seqs, engine.threads) == (24, 1)
    assert plain._config.models[0].dtype == "float32"
    pool = nested._config.draft_pool
    with_nested = replace(shared, server_config=nested._config, _servers={})
    assert with_nested.server() is with_nested.server("nested")
    assert with_nested.server()._config.draft_pool == pool
    assert with_nested.server("model-free")._config.draft_pool.drafters == pool.drafters[:2]


def test_engines_have_the_room_and_the_time_that_the_requests_need() -> None:
    for name in ("s2d-plain", "s2d-auto", "s2d-all"):
        engine = create(name, context(concurrency=1024, request_timeout_s=1800.0))
        assert isinstance(engine, S2DEngine)
        # As the server reads it from its file.
        config = ClusterConfig.model_validate(engine.server._config.model_dump(mode="json"))
        assert config.models[0].engine.max_num_seqs == 1024
        assert config.gateway.request_timeout_s >= 1800.0
    peer = create("hf", context(concurrency=256, request_timeout_s=1800.0))
    assert isinstance(peer, PeerEngine)
    assert peer._options.request_timeout_s >= 1800.0
    with pytest.raises(EngineUnavailableError, match="hf takes at most 256 requests at once, not 1024"):
        create("hf", context(concurrency=1024))
    short = context(request_timeout_s=5.0).server()._config
    assert short.gateway.request_timeout_s == ClusterConfig.default().gateway.request_timeout_s


def test_endpoints_by_url() -> None:
    engine = create("theirs=http://host:8000/v1?x=y", context())
    assert isinstance(engine, OpenAIEndpoint)
    assert engine.name == "theirs"
    with pytest.raises(EngineUnavailableError, match="unknown engine"):
        create("theirs", context())


def test_a_server_configuration_keeps_all_but_the_precision(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("models: [{name: mine, source: some/folder, dtype: bfloat16, max_model_len: 512}]")
    model = server_config(SpecSettings(server_config=file, dtype="float32")).models[0]
    assert (model.name, model.source, model.dtype, model.max_model_len) == (
        "mine", "some/folder", "float32", 512,
    )  # fmt: skip


def test_the_environment_is_recorded() -> None:
    record = environments.environment(bandwidth=False)
    assert record["cpu"]
    assert record["physical_cores"] >= 1
    assert record["packages"]["torch"]
    assert record["date"].endswith("+00:00")
    assert "memory_bandwidth_gb_s" not in record


def test_the_bandwidth_is_measured() -> None:
    assert 0 < environments.read_floor_seconds(1 << 20, repeats=2) < 1.0


def test_no_checkout_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object, **options: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert environments.git_commit() is None


@pytest.mark.parametrize(
    ("command", "number", "code"),
    [
        ("step", signal.SIGTERM, 143),
        ("step", signal.SIGINT, 130),
        ("trace", signal.SIGTERM, 143),
        ("trace", signal.SIGINT, 130),
    ],
)
def test_one_signal_ends_what_computes_in_the_main_thread(
    tmp_path: Path, command: str, number: signal.Signals, code: int
) -> None:
    where = ["--out", str(tmp_path)] if command == "step" else [str(tmp_path / "t.safetensors")]
    arguments = [sys.executable, "-c", STAND_INS, "bench", command, *where]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "measuring\n"
            process.send_signal(number)
            assert process.wait(60) == code
        finally:
            process.kill()
    if command == "step":
        document = json.loads((tmp_path / "step.json").read_text())
        assert document["interrupted"].startswith(("Terminated", "KeyboardInterrupt"))
        assert [steps["rows_s"] for steps in document["steps"]] == [{"1": [0.1]}]
        assert "**Incomplete:**" in (tmp_path / "step.md").read_text()


async def test_a_profile_without_psutil_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setattr("cluster.bench.session._measurement", lambda *arguments: started.append(arguments))
    with pytest.raises(BenchError, match=r"s2d-serve\[bench\]"):
        await measure_profile(ProfileSettings(), tmp_path)
    assert started == []
