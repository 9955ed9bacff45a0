"""`s2d bench` as users start it: its own server, real weights, files at the end, nothing left running."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import pytest

from cluster.bench.config import SpecSettings
from cluster.bench.engines.interface import BenchRequest
from cluster.bench.engines.s2d import S2DEngine
from cluster.bench.engines.s2d_server import S2DServer
from cluster.bench.running import running
from cluster.bench.session import server_config
from cluster.bench.turns import Turns
from cluster.processes import descendants
from tests.fake_bench_engine import FakeEngine
from tests.integration.ray_node import MARK, ROOT, marked_processes, wait_until

TIMEOUT_S = 400.0


def run_command(command: Sequence[str], environment: Mapping[str, str]) -> None:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**environment, "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.serve
def test_spec_with_two_prompts(tmp_path: Path) -> None:
    questions = tmp_path / "question.jsonl"
    lines = [
        {"question_id": 1, "category": "writing", "turns": ["Count from one to ten.", "Again, backwards."]},
        {"question_id": 2, "category": "qa", "turns": ["What is the capital of France?"]},
    ]
    questions.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "cluster.cli.main", "bench", "spec"]
    options = ["--dataset", "spec-bench", "--path", str(questions), "--dtype", "float32", "--all-turns"]
    engines = ["-e", "s2d-plain", "-e", "s2d-prompt_lookup", "--max-tokens", "24", "--out", str(out)]
    mark = uuid.uuid4().hex
    run_command([*command, *options, *engines], {**os.environ, MARK: mark})
    wait_until(lambda: not marked_processes(mark), 5.0, "no process is left")
    document = json.loads((out / "spec.json").read_text())
    assert document["interrupted"] is None
    assert len(document["records"]) == 6  # three turns on two engines
    assert all(record["error"] is None and record["token_ids"] for record in document["records"])
    assert document["engines"]["s2d-plain"]["dtype"] == "float32"
    assert document["environment"]["memory_bandwidth_gb_s"] > 0
    overall = {row["engine"]: row for row in document["summary"] if row["task"] == "overall"}
    assert overall["s2d-plain"]["mean_accepted_tokens"] == 1.0
    assert overall["s2d-prompt_lookup"]["mean_accepted_tokens"] >= 1.0
    same = overall["s2d-prompt_lookup"]["equality"]
    assert (same["ids_equal"], same["bytes_equal"]) == (3, 3)
    assert (out / "spec.png").exists()


@pytest.mark.slow
def test_steps_with_tiny_settings(tmp_path: Path) -> None:
    sizes = ["--rows", "1", "--rows", "8", "--batch", "1", "--batch", "2", "--repeats", "6"]
    contexts = [f"--context={n}" for n in (64, 128, 256, 512)]
    also = ["--row-invariance-price", "--agreement", "--agreement-tokens", "1", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "cluster.cli.main", "bench", "step", "--dtype", "bfloat16"]
    run_command([*command, *sizes, *contexts, *also], {"OMP_WAIT_POLICY": "PASSIVE", **os.environ})
    document = json.loads((tmp_path / "step.json").read_text())
    assert document["interrupted"] is None
    (steps,) = document["steps"]
    assert [len(seconds) for seconds in steps["rows_s"].values()] == [6, 6]
    assert len(steps["contexts_s"]) == 8
    assert set(steps["growth"]) == {"1", "2"}
    if steps["backend"] == "native":
        # Nothing is faster than reading the weights, as far as a cache lets that be said.
        assert min(steps["rows_s"]["1"]) > 0.5 * min(steps["floors_s"]) > 0
    (products,) = document["products"]
    assert products["native_changed"] == 0
    (agreement,) = document["agreement"]
    assert agreement["same"] >= 0.9 * agreement["tokens"]
    assert 0 < agreement["divergence"] < 0.05
    assert (tmp_path / "step.png").exists()


STOPPED_S = 35.0
"""Longer than Serve and Ray wait for an answer to their health checks."""


@pytest.mark.slow
@pytest.mark.serve
async def test_our_server_survives_the_turns_of_others() -> None:
    server = S2DServer(server_config(SpecSettings(engines=("s2d-plain",))))
    engine = S2DEngine("s2d-auto", server, {})
    request = BenchRequest("r", tuple(range(100, 120)), "", 16, ignore_eos=True)
    async with asyncio.timeout(TIMEOUT_S), running([engine], lambda text: None):
        before = await engine.generate(request)
        with Turns([engine], exclusive=True) as turns:
            await turns.give_to(FakeEngine("other"))
            processes = [psutil.Process(pid) for pid in (server.pid, *descendants(server.pid))]
            await asyncio.sleep(STOPPED_S)
            assert {process.status() for process in processes} == {psutil.STATUS_STOPPED}
            await turns.give_to(engine)
            await engine.reset()
            after = await engine.generate(request)
        assert (before.error, after.error) == (None, None)
        assert after.token_ids == before.token_ids
        assert all(process.is_running() for process in processes)
