"""From the scheduler's work list to the packed tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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

    def prompt(self, logits: Tensor) -> Tensor:
        return logits[self.first : self.last - self.decisions]


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
        positions.extend(range(start, start + work.num_rows))
        query_start.append(len(token_ids))
        context_lens.append(start + work.num_rows)
        wanted = begin + work.num_tokens - 1 if work.completes else len(token_ids)
        decisions = len(token_ids) - wanted
        if seq.wants_prompt_logprobs and start < seq.prompt_len - 1:
            wanted = begin
        first = len(logit_rows)
        logit_rows.extend(range(wanted, len(token_ids)))
        spans.append(RowSpan(first, len(logit_rows), decisions))
    width = max(len(work.seq.blocks) for work in works)
    tables = torch.zeros(len(works), width, dtype=torch.int32)
    for index, work in enumerate(works):
        tables[index, : len(work.seq.blocks)] = torch.tensor(work.seq.blocks, dtype=torch.int32)
    batch = RaggedBatch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64, device=device),
        positions=torch.tensor(positions, dtype=torch.int64, device=device),
        query_start=torch.tensor(query_start, dtype=torch.int64, device=device),
        context_lens=torch.tensor(context_lens, dtype=torch.int64, device=device),
        block_tables=tables.to(device),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64, device=device),
    )
    return batch, spans
