"""Drafting for a target with another vocabulary by the target's own noise (token-level intersection, TLI, of
arXiv 2502.05202)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from actors.drafting.draw import CutVocabulary
    from actors.sampling.params import DraftSampling


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class SharedTokens:
    """Tokens that a draft and a target have in common. `draft_ids`, `target_ids`: int64 [S], one to one,
    draft ids ascending. `size`: the target's vocabulary."""

    draft_ids: Tensor
    target_ids: Tensor
    size: int


@dataclass(frozen=True, slots=True)
class Coupling:
    """What to sample like: the target's sampling, and the absolute index in the target's sequence of the
    first token drafted. Only shared tokens are drafted, so that token j of the draft is the target's at
    `position + j`."""

    sampling: DraftSampling
    position: int
    shared: SharedTokens


@dataclass(frozen=True, slots=True)
class SharedColumns:
    """Shared tokens seen from a draft's logits. `columns`: int64 [S'], of the logits; `vocabulary`: the
    target's tokens that they stand for; `draft_of`: target id -> draft id."""

    columns: Tensor
    vocabulary: CutVocabulary
    draft_of: dict[int, int] = field(repr=False)


def shared_columns(shared: SharedTokens, cut: CutVocabulary | None, device: torch.device) -> SharedColumns:
    """`cut`: what the columns of a cut head stand for; None: column v is the draft's token v. Shared tokens
    that the head lacks are left out; there may be none left."""
    from actors.drafting.draw import CutVocabulary

    draft_ids, target_ids = shared.draft_ids, shared.target_ids
    columns = draft_ids
    if cut is not None:
        ids = cut.ids.cpu()
        columns = torch.searchsorted(ids, draft_ids).clamp_(max=len(ids) - 1)
        kept = ids[columns] == draft_ids
        columns, draft_ids, target_ids = columns[kept], draft_ids[kept], target_ids[kept]
    return SharedColumns(
        columns.to(device),
        CutVocabulary(target_ids.to(device), shared.size),
        dict(zip(target_ids.tolist(), draft_ids.tolist(), strict=True)),
    )
