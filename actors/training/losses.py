"""The loss of sorted fine-tuning: the mean of all exits' losses (SoFT, arXiv 2309.08968 eq. 1), each against
teachers' stored distributions, the labels, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actors.training.batches import Batch, TeacherBatch
from actors.training.online_teacher import Taught
from actors.training.student import SortedStudent

_TINY = 1e-6


def distillation(logits: Tensor, teacher: TeacherBatch) -> tuple[Tensor, Tensor]:
    """Kullback-Leibler divergence KL(teacher || draft) over the stored tokens and one bin for the rest.

    The teacher is first conditioned on what the draft can say: probability of listed tokens outside the
    draft's vocabulary is removed, and a row weighs what remains.

    Args:
        logits: float32 [N, D].
        teacher: rows [N, k]; ids are the draft's, -1 for a token outside its vocabulary or padding.

    Returns:
        Sum over rows of weight * divergence, and sum of weights.
    """
    present = teacher.ids >= 0
    p = teacher.logprobs.exp()
    outside = (p * ~present).sum(-1)
    within = (1.0 - outside).clamp(min=0.0, max=1.0)
    p = torch.where(present, p / within.clamp(min=_TINY)[:, None], 0.0)
    rest = (1.0 - p.sum(-1)).clamp(min=0.0)
    log_q = F.log_softmax(logits, dim=-1).gather(-1, teacher.ids.clamp(min=0))
    q_rest = 1.0 - torch.where(present, log_q.exp(), 0.0).sum(-1)
    listed = torch.where(present, torch.xlogy(p, p) - p * log_q, 0.0).sum(-1)
    divergence = listed + torch.xlogy(rest, rest) - rest * q_rest.clamp(min=_TINY).log()
    return (within * divergence).sum(), within.sum()


def full_distillation(logits: Tensor, logprobs: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
    """`distillation` over the draft's whole vocabulary: the teacher conditioned on it, each row weighing the
    probability that it has there.

    Args:
        logits, logprobs: float32 [N, D]; the teacher's are normalised.
        within: float32 [N].
    """
    with torch.no_grad():
        p = logprobs.exp()
        negative_entropy = (p * logprobs).sum(-1)
    divergence = negative_entropy - (p * F.log_softmax(logits, dim=-1)).sum(-1)
    return (within * divergence).sum(), within.sum()


@dataclass(frozen=True, slots=True)
class ExitScores:
    """Sums over labels, one entry an exit: cross-entropy over labels in the vocabulary, labels that the best
    token equals, and the teacher's best tokens that it equals."""

    labels: int
    known: int
    cross_entropy: list[float]
    agree: list[int]
    agree_teacher: list[int]


class SortedLoss(nn.Module):
    """`forward(batch)` is the loss of a step, so that wrappers for data parallelism see one module."""

    def __init__(self, student: SortedStudent, distill: float) -> None:
        super().__init__()
        self.student, self._distill = student, distill
        self._full = full_distillation

    def compile_losses(self) -> None:
        self._full = torch.compile(full_distillation)

    def forward(self, batch: Batch, taught: Taught | None = None) -> tuple[Tensor, dict[str, Any]]:
        """The mean loss of all exits, and each exit's own (detached). `taught`: what an online teacher says
        of the batch, in the place of stored teachers and states."""
        states = batch.states if taught is None else taught.states
        hidden = self.student(batch.ids, batch.positions, batch.sequence, states)
        losses = [
            self._exit_loss(self.student.loss_logits(h[batch.rows, batch.columns], index), batch, taught)
            for index, h in enumerate(hidden)
        ]
        stacked = torch.stack(losses)
        return stacked.mean(), {"exits": stacked.detach()}

    def _exit_loss(self, logits: Tensor, batch: Batch, taught: Taught | None) -> Tensor:
        known = batch.labels >= 0
        share = self._distill if batch.teachers or taught is not None else 0.0
        total = logits.new_zeros(())
        if share < 1.0:
            entropy = F.cross_entropy(logits, batch.labels, ignore_index=-1, reduction="sum")
            total = total + (1.0 - share) * entropy / known.sum().clamp(min=1)
        if taught is not None and share > 0.0:
            divergence, weight = self._full(logits, taught.logprobs, taught.within)
            return total + share * divergence / weight.clamp(min=_TINY)
        for teacher in batch.teachers if share > 0.0 else ():
            divergence, weight = distillation(logits, teacher)
            total = total + share / len(batch.teachers) * divergence / weight.clamp(min=_TINY)
        return total

    @torch.no_grad()
    def score(self, batch: Batch) -> ExitScores:
        """What held-out measurements add up. A label outside the draft's vocabulary counts as a miss."""
        hidden = self.student(batch.ids, batch.positions, batch.sequence, batch.states)
        scores = ExitScores(batch.labels.numel(), int((batch.labels >= 0).sum()), [], [], [])
        for index, h in enumerate(hidden):
            logits = self.student.logits(h[batch.rows, batch.columns], index)
            best = logits.argmax(-1)
            scores.cross_entropy.append(
                float(F.cross_entropy(logits, batch.labels, ignore_index=-1, reduction="sum"))
            )
            scores.agree.append(int((best == batch.labels).sum()))
            top = batch.teachers[0].ids[:, 0] if batch.teachers else batch.labels
            scores.agree_teacher.append(int((best == top).sum()))
        return scores
