"""Step times: points, batches, fits, tables, agreement; a real run with tiny settings is in integration."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.models.runner import BLOCK_SIZE
from cluster.bench.config import StepSettings
from cluster.bench.fit import fit_growth
from cluster.bench.step.agreement import Agreement, divergences
from cluster.bench.step.command import write_step
from cluster.bench.step.products import ProductTimes
from cluster.bench.step.report import StepResults, fits, step_tables
from cluster.bench.step.times import (
    StepPoint,
    StepTimes,
    blocks_needed,
    context_points,
    measure_steps,
    row_points,
    step_batch,
)

XS = (128, 512, 1024, 2048, 4096, 8192)


def curves(a: float, b: float, c: float, noise: float, repeats: int = 15) -> list[list[float]]:
    draw = np.random.default_rng(0)
    return [
        [(a + b * x + c * x * x) * (1 + noise * draw.standard_normal()) for x in XS] for _ in range(repeats)
    ]


def test_a_line_has_no_quadratic_term() -> None:
    fit = fit_growth(XS, curves(0.012, 4e-6, 0.0, 0.01))
    assert not fit.resolved
    assert fit.intercept == pytest.approx(0.012, rel=0.05)
    assert fit.slope == pytest.approx(4e-6, rel=0.05)
    assert abs(fit.share) < 0.05
    assert fit.worst_residual < 0.05


def test_a_parabola_is_found_with_its_share() -> None:
    c = 1e-9  # at 8192: 0.067 of 0.112
    fit = fit_growth(XS, curves(0.012, 4e-6, c, 0.01))
    assert fit.resolved
    top = XS[-1]
    assert fit.share == pytest.approx(c * top**2 / (0.012 + 4e-6 * top + c * top**2), abs=0.05)
    assert fit.low is not None
    assert fit.low > 0.4


@given(st.floats(1e-4, 1.0), st.floats(0, 1e-4), st.floats(0, 1e-8))
def test_an_exact_curve_gives_its_share_whatever_the_scale(a: float, b: float, c: float) -> None:
    fit = fit_growth(XS, curves(a, b, c, 0.0, repeats=1))
    top = XS[-1]
    assert fit.share == pytest.approx(c * top**2 / (a + b * top + c * top**2), abs=1e-6)
    assert (fit.low, fit.high, fit.resolved) == (None, None, False)


def test_three_lengths_are_not_enough() -> None:
    with pytest.raises(ValueError, match="4 different lengths"):
        fit_growth((1, 2, 3, 3), [[1.0, 2.0, 3.0, 3.0]])


def test_sequences_of_a_batch_share_no_block() -> None:
    batch = step_batch(StepPoint(3, 2, 70))
    assert batch.context_lens.tolist() == [70] * 3
    assert batch.positions.tolist() == [68, 69] * 3
    assert batch.query_start.tolist() == [0, 2, 4, 6]
    assert batch.block_tables.numel() == batch.block_tables.unique().numel() == 3 * math.ceil(70 / BLOCK_SIZE)
    assert batch.logit_rows.tolist() == list(range(6))


def test_points_and_the_pool_that_they_need() -> None:
    settings = StepSettings(rows=(1, 8), row_context=200, contexts=(128, 256, 512, 1024), batches=(1, 4))
    assert row_points(settings)[8] == StepPoint(1, 8, 208)
    assert context_points(settings)[4, 1024] == StepPoint(4, 1, 1024)
    assert blocks_needed([*row_points(settings).values(), *context_points(settings).values()]) == 4 * 32


def test_divergence_is_that_of_kullback_and_leibler() -> None:
    generator = torch.Generator().manual_seed(1)
    p, q = (torch.randn(3, 50, generator=generator) for _ in range(2))
    reference = torch.nn.functional.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="none").sum(-1)
    assert torch.allclose(divergences(p, q).float(), reference, atol=1e-5)
    assert torch.equal(divergences(p, p), torch.zeros(3, dtype=torch.float64))


def times() -> StepTimes:
    found = StepTimes("int8", "native", "avx2", 2, 138_000_000, floors_s=[0.005] * 15)
    found.rows_s = {1: [0.007] * 15, 8: [0.014] * 15}
    found.contexts_s = {(b, x): [0.007 * b + 1e-6 * b * x] * 15 for b in (1, 4) for x in XS}
    return found


def test_tables_files_and_picture(tmp_path: Path) -> None:
    results = StepResults(
        [times()],
        [ProductTimes("bfloat16", 121, 2, {1: [0.01], 8: [0.02]}, {1: [0.04], 8: [0.05]}, 0, 90)],
        [Agreement("int8", 780, 760, 0.004)],
    )
    write_step(tmp_path, StepSettings(dtypes=("int8",)), results, {"cpu": "one"})
    text = (tmp_path / "step.md").read_text()
    assert "2.00 / 2.00 [2.00, 2.00], n=15, above 1.2" in text
    assert "1.40 / 1.40 [1.40, 1.40], n=15, above 1" in text
    assert "| int8 | 4 | 28.00 | 4.000 |" in text
    assert "0 / 90 of 121" in text
    assert "760 of 780 (97.4%)" in text
    assert (tmp_path / "step.png").stat().st_size > 1000
    assert '"growth"' in (tmp_path / "step.json").read_text()


def test_an_interrupted_repeat_is_left_out_of_fits_and_ratios() -> None:
    partial = times()
    partial.rows_s[8].pop()
    for key in list(partial.contexts_s)[:3]:
        partial.contexts_s[key].append(9.9)
    assert fits(partial)[1].slope == pytest.approx(1e-6)
    assert step_tables(StepResults([partial]))


def test_an_interrupted_precision_keeps_its_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = SimpleNamespace(num_blocks=1, forward=lambda batch: None)
    loaded = SimpleNamespace(runner=runner, backend="none", info=SimpleNamespace(max_model_len=512))
    monkeypatch.setattr("cluster.bench.step.times.load_runner", lambda *args, **options: loaded)
    kept: list[StepTimes] = []
    seen: list[int] = []

    def advance() -> None:
        seen.append(len(kept))
        if len(seen) == 2:
            raise KeyboardInterrupt

    settings = StepSettings(rows=(1, 8), contexts=(), batches=())
    with pytest.raises(KeyboardInterrupt):
        measure_steps("float32", settings, kept, advance)
    assert seen == [1, 1]
    assert {rows: len(seconds) for rows, seconds in kept[0].rows_s.items()} == {1: 2, 8: 2}
