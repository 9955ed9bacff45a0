"""Traces and their replay: by hand in small cases, and the bounds of the choice where drafts always or never
pay."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cluster.bench.choice.live import read_cells, speculation
from cluster.bench.running import BenchError
from cluster.cli.main import app
from cluster.router.reports import Assignment, DraftReport, TargetReport
from cluster.router.router import Router
from cluster.simulator.choice_quality import measure_cell
from cluster.simulator.choice_report import write
from cluster.simulator.replay import Fixed, ReplaySettings, replay
from cluster.simulator.replay_draft import TracedDrafter
from cluster.simulator.trace import (
    NOTHING,
    Trace,
    TraceCard,
    TracedAnswer,
    TraceError,
    load_trace,
    save_trace,
)

CHAIN = 4
TOKENS = tuple(range(10, 42))
QUIET = ReplaySettings(
    concurrency=(1,), lengths=(1, 4), latency_ms=0.0, noise=0.0, warmup_s=5.0, measured_s=10.0, fixed_s=10.0
)


def trace(right: int, step_s: float = 0.001) -> Trace:
    """Every chain has its first `right` tokens right. A round takes 10 ms + 1 ms a row."""
    drafts = np.full((len(TOKENS), CHAIN), NOTHING, np.int32)
    for place in range(1, len(TOKENS)):
        for at in range(CHAIN):
            known = at < right and place + at < len(TOKENS)
            drafts[place, at] = TOKENS[place + at] if known else 1
    confidence = np.where(np.arange(CHAIN) < right, 0.95, 0.05).astype(np.float32)
    answer = TracedAnswer(
        "qa",
        (1, 2, 3),
        TOKENS,
        np.array([[t, 0] for t in TOKENS], np.int32),
        {2: drafts},
        {2: np.tile(confidence, (len(TOKENS), 1))},
    )
    card = TraceCard(
        target="toy",
        source="toy",
        dtype="float32",
        draft="toy",
        draft_hash="",
        tokenizer_hash="",
        dataset="builtin",
        dataset_hash="",
        tasks=("qa",),
        exits=(2,),
        chain=CHAIN,
        verify_s={1: 0.011, 11: 0.021},
        step_s={2: {1: step_s, 8: step_s}},
    )
    return Trace(card, (answer,))


def test_a_trace_survives_its_file(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    written, made = save_trace(trace(2), file), trace(2)
    read = load_trace(file)
    assert read.card == written
    assert len(written.content_hash) == 64
    (a,), (b,) = read.answers, made.answers
    assert (a.task, a.prompt_ids, a.token_ids) == (b.task, b.prompt_ids, b.token_ids)
    assert np.array_equal(a.drafts[2], b.drafts[2])
    assert np.array_equal(a.candidates, b.candidates)
    assert np.array_equal(a.confidence[2], b.confidence[2])


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    with pytest.raises(TraceError, match="safetensors"):
        load_trace(file)
    save_trace(trace(2), file)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(TraceError, match="content_hash"):
        load_trace(file)
    old = trace(2)
    save_trace(replace(old, card=old.card.model_copy(update={"version": 0})), file)
    with pytest.raises(TraceError, match="version 0"):
        load_trace(file)


def test_plain_decoding_by_hand() -> None:
    result = replay(trace(4), "qa", 1, Fixed(), QUIET)
    # The first of the answer's tokens comes with the prompt; each other one takes 11 ms.
    assert result.tokens_per_s == pytest.approx(1 / 0.011, rel=1e-6)
    assert replay(trace(4), "qa", 2, Fixed(), QUIET).tokens_per_s == pytest.approx(2 / 0.012, rel=1e-6)


@given(right=st.integers(0, CHAIN), length=st.integers(1, CHAIN))
def test_fixed_lengths_by_hand(right: int, length: int) -> None:
    settings = QUIET.model_copy(update={"fixed_s": 0.4})
    result = replay(trace(right), "qa", 1, Fixed(2, length), settings)
    # 31 tokens a pass over the answer; the last one is never drafted, and no more than are left.
    left, seconds = len(TOKENS) - 1, 0.0
    while left:
        drafted = min(length, left - 1)
        seconds += drafted * 0.001 + 0.010 + 0.001 * (1 + drafted)
        left -= min(right, drafted) + 1
    assert result.tokens_per_s == pytest.approx((len(TOKENS) - 1) / seconds, rel=0.12)


def test_the_free_choice_finds_drafts_that_pay_and_leaves_those_that_do_not() -> None:
    good, bad = measure_cell(trace(4), "qa", 1, QUIET), measure_cell(trace(0), "qa", 1, QUIET)
    assert (good.best, bad.best) == (Fixed(2, 4), Fixed())
    assert good.to_best > 0.95
    assert good.to_plain > 2
    assert bad.to_plain > 0.97
    assert all(cell.holds for cell in (good, bad))


def test_utilisation_is_a_share_of_the_time_since_the_last_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round takes longer than the router's interval here."""
    seen: list[tuple[float, float, float]] = []
    step, drafter = Router.step, {}
    times = TracedDrafter.step_s_by_exit

    def noted(self: TracedDrafter) -> Mapping[int, Mapping[int, float]]:
        drafter["busy_s"] = self.busy_s
        return times(self)

    def spy(
        self: Router, now: float, targets: Sequence[TargetReport], drafts: Sequence[DraftReport]
    ) -> dict[str, Assignment]:
        seen.append((now, drafts[0].utilisation, drafter["busy_s"]))
        return step(self, now, targets, drafts)

    monkeypatch.setattr(TracedDrafter, "step_s_by_exit", noted)
    monkeypatch.setattr(Router, "step", spy)
    replay(trace(4), "qa", 1, None, QUIET.model_copy(update={"scale": 150.0}))
    assert max(utilisation for _, utilisation, _ in seen) > 0.0
    for (before, _, busy_before), (now, utilisation, busy) in pairwise(seen):
        assert now - before > 1.4
        assert utilisation == pytest.approx((busy - busy_before) / (now - before))


def test_a_replay_repeats_and_names_what_is_wrong() -> None:
    noisy = QUIET.model_copy(update={"noise": 0.1, "measured_s": 3.0})
    assert replay(trace(3), "qa", 2, None, noisy) == replay(trace(3), "qa", 2, None, noisy)
    for task, fixed, word in (
        ("chat", None, "task"),
        ("qa", Fixed(3, 1), "exit"),
        ("qa", Fixed(2, 5), "length"),
    ):
        with pytest.raises(ValueError, match=word):
            replay(trace(3), task, 1, fixed, QUIET)


def test_model_free_drafters_run_as_they_serve() -> None:
    settings = QUIET.model_copy(update={"drafters": ("prompt_lookup", "token_recycling", "nested")})
    # Token Recycling has seen the answer in the first pass; the nested draft is never right.
    assert replay(trace(0), "qa", 1, None, settings).accepted > 0.5


def test_report_and_cells_of_the_live_check(tmp_path: Path) -> None:
    made = trace(4)
    cells = [measure_cell(made, "qa", n, QUIET) for n in (1, 2)]
    total = write(tmp_path, [made.card], QUIET, cells)
    assert total["cells"] == 2
    assert (tmp_path / "choice.png").stat().st_size > 0
    assert "| toy | qa | 1 |" in (tmp_path / "choice.md").read_text()
    chosen = read_cells(tmp_path / "choice.json", 8, 2)
    assert {c.concurrency for c in chosen} == {1, 2}
    assert all(len(c.best) == 2 for c in chosen)
    assert [speculation(None), speculation(Fixed())] == [{}, {"enabled": False}]
    assert speculation(Fixed(2, 4))["exit_depth"] == 2
    (tmp_path / "other.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(BenchError, match=r"choice\.json"):
        read_cells(tmp_path / "other.json", 8, 2)


def test_command_line(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    save_trace(trace(4), file)
    arguments = ["bench", "replay", str(file), "--concurrency", "1", "--measured", "5", "-o", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "1 of 1 cells hold" in result.output
    missing = CliRunner().invoke(app, ["bench", "replay", str(tmp_path / "none")])
    assert missing.exit_code == 1
