"""A target whose tokenizer is not the nested drafter's, as the draft worker sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from actors.drafting.coupling import SharedTokens
from actors.text.vocabulary_pair import VocabularyPair


@dataclass(frozen=True, slots=True, eq=False)
class ForeignTarget:
    pair: VocabularyPair
    shared: SharedTokens


def foreign_target(pair: VocabularyPair) -> ForeignTarget:
    ids = sorted(pair.target_of.items())
    ours, theirs = (torch.tensor(column, dtype=torch.int64) for column in zip(*ids, strict=True))
    return ForeignTarget(pair, SharedTokens(ours, theirs, pair.target.size))
