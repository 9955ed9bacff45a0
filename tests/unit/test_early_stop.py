"""Calibrated confidence, and drafts that end when a rejection has become likely."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.drafting.draft_load import load_draft
from actors.drafting.early_stop import EarlyStop, interpolate
from actors.drafting.interface import DraftQuery, SessionOpen
from actors.drafting.nested import NestedDrafter
from actors.isotonic import isotonic
from actors.models.draft_artifact import load_artifact
from actors.models.draft_card import CalibrationCurve, ExitCalibration
from actors.sampling.params import DraftSampling
from actors.training.batches import TeacherBatch
from actors.training.calibrate import _soft_labels, fit_curve
from tests.toy_draft import toy_base, toy_draft

HALF = CalibrationCurve(confidence=(0.0, 1.0), acceptance=(0.5, 0.5))
FLAT = CalibrationCurve(confidence=(0.2, 0.6), acceptance=(0.1, 0.9))


def test_curves_interpolate_and_stay_flat_outside() -> None:
    assert interpolate(FLAT, 0.0) == 0.1
    assert interpolate(FLAT, 0.4) == pytest.approx(0.5)
    assert interpolate(FLAT, 0.6) == 0.9
    assert interpolate(FLAT, 1.0) == 0.9
    for xs, ys in (((0.2, 0.2), (0.1, 0.2)), ((0.1, 0.2), (0.2, 0.1)), ((0.1,), (0.1, 0.2))):
        with pytest.raises(ValueError, match=r"ascend|one acceptance"):
            CalibrationCurve(confidence=xs, acceptance=ys)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.5, 4)), min_size=1, max_size=12))
def test_isotonic_is_the_nearest_ascending_sequence(points: list[tuple[float, float]]) -> None:
    values, weights = [v for v, _ in points], [w for _, w in points]
    fitted = isotonic(values, weights)
    assert all(b >= a - 1e-12 for a, b in pairwise(fitted))
    mean = np.average(values, weights=weights)
    assert np.average(fitted, weights=weights) == pytest.approx(mean, abs=1e-9)

    def distance(candidate: list[float]) -> float:
        return float(sum(w * (c - v) ** 2 for c, v, w in zip(candidate, values, weights, strict=True)))

    for candidate in ([float(mean)] * len(values), list(np.maximum.accumulate(values)), sorted(values)):
        assert distance(fitted) <= distance(candidate) + 1e-9


def test_a_fitted_curve_finds_the_law_behind_the_labels() -> None:
    rng = np.random.default_rng(1)
    confidence = rng.uniform(0, 1, 20_000)
    accepted = (rng.uniform(0, 1, 20_000) < confidence**2).astype(float)
    curve = fit_curve(confidence, accepted)
    assert curve is not None
    for x in (0.2, 0.5, 0.9):
        assert interpolate(curve, x) == pytest.approx(x**2, abs=0.04)
    assert fit_curve(confidence[:5], accepted[:5]) is None


def test_a_saturated_drafts_curve_ascends() -> None:
    """Most confidences round to 1: the card could not tell their bins apart."""
    rng = np.random.default_rng(0)
    confidence = 1 - 10 ** -rng.uniform(0.3, 7, 2000)
    curve = fit_curve(confidence, (rng.uniform(0, 1, 2000) < confidence).astype(float))
    assert curve is not None
    assert curve.confidence[-1] == 1.0
    # Of six bins of eight labels the last four are one knot: its acceptance is that of all their labels.
    confidence = np.repeat([0.2, 0.4, 0.999996, 0.999999], [8, 8, 8, 24])
    accepted = np.concatenate((np.zeros(16), np.ones(8), np.tile([0.0, 1.0], 12)))
    curve = fit_curve(confidence, accepted)
    assert curve is not None
    assert (curve.confidence, curve.acceptance) == ((0.2, 0.4, 1.0), (0.0, 0.0, 0.625))


def test_soft_labels_average_to_the_overlap_of_both_distributions() -> None:
    """E over x ~ q of min(1, p / q) is the sum of min(p, q)."""
    q = torch.tensor([[0.6, 0.3, 0.1]]).repeat(20_000, 1)
    teacher = TeacherBatch(
        torch.tensor([[2, 0]]).repeat(20_000, 1), torch.tensor([[0.7, 0.2]]).log().repeat(20_000, 1)
    )
    chosen, labels = _soft_labels(q, teacher, torch.Generator().manual_seed(0))
    assert float(labels.mean()) == pytest.approx(0.2 + 0.0 + 0.1, abs=0.01)
    assert set(chosen.unique().tolist()) == set(q[0].tolist())


@pytest.mark.parametrize(("threshold", "length"), [(None, 6), (0.4, 1), (0.6, 2), (0.8, 3), (0.9, 4)])
def test_a_draft_ends_when_a_rejection_is_likely(
    tmp_path: Path, threshold: float | None, length: int
) -> None:
    """Every token is accepted with probability one half: after n, one was rejected with 1 - 2^-n."""
    base = toy_base(tmp_path / "base")
    toy_draft(tmp_path / "d.safetensors", base)
    loaded = load_draft(str(base), str(tmp_path / "d.safetensors"), dtype="float32", kv_blocks=16, threads=1)
    stop = EarlyStop((ExitCalibration(greedy=HALF),) * 2, threshold)
    drafter = NestedDrafter(loaded.runner, loaded.exits, heads=loaded.heads, early_stop=stop)
    plain = NestedDrafter(loaded.runner, loaded.exits, heads=loaded.heads)
    for one in (drafter, plain):
        one.open(SessionOpen(0, (1, 2, 3), 3, DraftSampling(key=1)))
    (draft,) = drafter.propose([DraftQuery(0, 1, 6)])
    (whole,) = plain.propose([DraftQuery(0, 1, 6)])
    assert draft.token_ids == whole.token_ids[:length]
    assert draft.confidence == (0.5,) * length


def test_sampled_drafts_have_a_curve_of_their_own() -> None:
    stop = EarlyStop((ExitCalibration(greedy=HALF, sampled=FLAT), ExitCalibration(greedy=FLAT)))
    assert stop.acceptance(0, 1.0, greedy=True) == 0.5
    assert stop.acceptance(0, 1.0, greedy=False) == 0.9
    assert stop.acceptance(1, 0.2, greedy=False) == pytest.approx(0.1)
    assert EarlyStop().acceptance(0, 0.37, greedy=True) == 0.37
    assert not stop.ends(0.0)


def test_curves_travel_in_the_card(tmp_path: Path) -> None:
    base = toy_base(tmp_path / "base")
    curves = (ExitCalibration(greedy=HALF, sampled=FLAT), ExitCalibration(greedy=FLAT))
    toy_draft(tmp_path / "d.safetensors", base, calibration=curves)
    assert load_artifact(tmp_path / "d.safetensors")[0].calibration == curves
    assert load_artifact(tmp_path / "d.safetensors", exits=(2,))[0].calibration == curves[1:]
    with pytest.raises(ValueError, match="one an exit"):
        toy_draft(tmp_path / "e.safetensors", base, calibration=curves[:1])
