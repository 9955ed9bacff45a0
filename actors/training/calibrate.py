"""How often a draft's token is accepted, as a function of the probability that the draft gave it.

Measured on held-out labels, exit by exit. Greedy: the exit's best token, accepted when it is the target's.
Sampled: a token drawn from the exit, with the soft label min(1, p / q) of rejection sampling, p from the
stored teacher (0 for a token that it does not list).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.isotonic import isotonic
from actors.models.draft_card import CalibrationCurve, ExitCalibration
from actors.training.batches import Batch, TeacherBatch
from actors.training.student import SortedStudent

BINS = 24
FEWEST = 8
"""Labels of a bin, at least."""
Floats = npt.NDArray[np.float64]


def fit_curve(confidence: Floats, accepted: Floats) -> CalibrationCurve | None:
    """Isotonic over bins of equally many labels; None with too few labels for one bin."""
    count = len(confidence)
    if count < FEWEST:
        return None
    order = np.argsort(confidence, kind="stable")
    bins = np.array_split(order, max(1, min(BINS, count // FEWEST)))
    # By confidence as it is stored: bins that are too close to be told apart there are one.
    labels: dict[float, list[Floats]] = {}
    for b in bins:
        labels.setdefault(round(float(confidence[b].mean()), 5), []).append(accepted[b])
    knots = {x: np.concatenate(parts) for x, parts in labels.items()}
    ys = isotonic([float(y.mean()) for y in knots.values()], [float(len(y)) for y in knots.values()])
    return CalibrationCurve(confidence=tuple(knots), acceptance=tuple(round(y, 5) for y in ys))


@torch.no_grad()
def calibrate(student: SortedStudent, batches: Sequence[Batch], seed: int = 0) -> tuple[ExitCalibration, ...]:
    """Curves of every exit, in order; empty when there are too few held-out labels."""
    generator = torch.Generator().manual_seed(seed)
    count = len(student.exits)
    greedy: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(count)]
    sampled: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(count)]
    for batch in batches:
        hidden = student(batch.ids, batch.positions, batch.sequence, batch.states)
        truth = batch.teachers[0].ids[:, 0] if batch.teachers else batch.labels
        for index, h in enumerate(hidden):
            q = student.logits(h[batch.rows, batch.columns], index).softmax(-1).cpu()
            top, best = q.max(-1)
            greedy[index].append((top, (best == truth.cpu()).float()))
            if batch.teachers:
                sampled[index].append(_soft_labels(q, batch.teachers[0], generator))
    curves = [(_fit(g), _fit(s)) for g, s in zip(greedy, sampled, strict=True)]
    if any(g is None for g, _ in curves):
        return ()
    return tuple(ExitCalibration(greedy=g, sampled=s) for g, s in curves if g is not None)


def _soft_labels(q: Tensor, teacher: TeacherBatch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(q of a token drawn from each row, min(1, p / q) of it)."""
    drawn = torch.multinomial(q, 1, generator=generator)
    listed = teacher.ids.cpu() == drawn
    p = (teacher.logprobs.cpu().exp() * listed).sum(-1)
    chosen = q.gather(-1, drawn)[:, 0]
    return chosen, (p / chosen.clamp(min=1e-12)).clamp(max=1.0)


def _fit(parts: Sequence[tuple[Tensor, Tensor]]) -> CalibrationCurve | None:
    if not parts:
        return None
    confidence, accepted = (torch.cat([p[i] for p in parts]).double().numpy() for i in (0, 1))
    return fit_curve(confidence, accepted)
