"""From the scheduler's work list to the packed tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actors.drafting.tree import chain_parents, depths
from actors.engine.sequence import Work
from actors.models.runner import RaggedBatch


@dataclass(frozen=True, slots=True)
class RowSpan:
    """Where one work's logits are: rows [first, last). The final `decisions` of them decide tokens (one a
    draft and one more), those before score prompt tokens."""

    first: int
    last: int
    decisions: int

    def deciding(self, logits: Tensor) -> Tensor:
        return logits[self.last - self.decisions : self.last]


def build_batch(works: Sequence[Work], device: torch.device) -> tuple[RaggedBatch, list[RowSpan]]:
    """Pack the works in order. Only rows whose logits somebody needs are asked for."""
    token_ids: list[int] = []
    positions: list[int] = []
    query_start = [0]
    context_lens: list[int] = []
    logit_rows: list[int] = []
    spans: list[RowSpan] = []
    for work in works:
        seq, start = work.seq, work.seq.num_computed
        begin = len(token_ids)
        token_ids.extend(seq.token_ids[start : start + work.num_tokens])
        token_ids.extend(work.drafts)
        positions.extend(range(start, start + work.num_tokens))
        last = start + work.num_tokens - 1
        positions.extend(last + depth for depth in depths(_draft_parents(work)))
        query_start.append(len(token_ids))
        context_lens.append(start + work.num_rows)
        wanted = begin + work.num_tokens - 1 if work.completes else len(token_ids)
        decisions = len(token_ids) - wanted
        if seq.scores_prompt and start < seq.prompt_len - 1:
            wanted = begin
        first = len(logit_rows)
        logit_rows.extend(range(wanted, len(token_ids)))
        spans.append(RowSpan(first, len(logit_rows), decisions))
    tables = np.zeros((len(works), max(len(work.seq.blocks) for work in works)), dtype=np.int32)
    for index, work in enumerate(works):
        tables[index, : len(work.seq.blocks)] = work.seq.blocks
    batch = RaggedBatch(
        token_ids=_integers(token_ids, device),
        positions=_integers(positions, device),
        query_start=_integers(query_start, device),
        context_lens=_integers(context_lens, device),
        block_tables=torch.from_numpy(tables).to(device),
        logit_rows=_integers(logit_rows, device),
        parents=_integers(_parents(works), device) if any(work.parents for work in works) else None,
    )
    return batch, spans


def _parents(works: Sequence[Work]) -> list[int]:
    """See `RaggedBatch.parents`; all that is not in a tree follows the entry before it."""
    parents: list[int] = []
    for work in works:
        begin = len(parents)
        last = begin + work.num_tokens - 1
        parents += [-1, *range(begin, last)]
        parents += [last + 1 + parent for parent in _draft_parents(work)]
    return parents


def _draft_parents(work: Work) -> Sequence[int]:
    return work.parents or chain_parents(len(work.drafts))


def _integers(values: list[int], device: torch.device) -> Tensor:
    """By way of numpy, which turns a list into an array faster than torch."""
    return torch.from_numpy(np.array(values, dtype=np.int64)).to(device)
