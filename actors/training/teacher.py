"""Top-k log-probabilities of a target over stored sequences: for further targets, and for texts that no
target generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from actors.models.llama_load import UnsupportedModelError
from actors.models.runner import BLOCK_SIZE, LayeredRunner, ModelRunner, RaggedBatch, normalised
from actors.training.token_store import TeacherRows, TokenSequence


class Teacher:
    """Runs whole sequences through a target, several in one pass.

    Args:
        runner: its KV pool bounds a pass.
        top: tokens kept a label.
        batch_tokens: of a pass, at most; a longer sequence has one of its own.
        states: whether rows come with states, which needs a `LayeredRunner`.

    Raises UnsupportedModelError for a runner that gives no states.
    """

    def __init__(self, runner: ModelRunner, top: int, batch_tokens: int, *, states: bool = False) -> None:
        self._runner, self._top, self._batch_tokens = runner, top, batch_tokens
        self._layered: LayeredRunner | None = None
        if states:
            if not isinstance(runner, LayeredRunner):
                kind = type(runner).__name__
                raise UnsupportedModelError(f"states: {runner.info.name} runs on {kind}, which gives none")
            self._layered = runner

    def rows(
        self, sequences: Sequence[TokenSequence], on_tokens: Callable[[int], None] = lambda count: None
    ) -> list[TeacherRows]:
        """Rows of every sequence's labels, in order. Raises ValueError for one longer than the context."""
        limit = min(self._runner.info.max_model_len, self._runner.num_blocks * BLOCK_SIZE)
        longest = max(len(s.ids) for s in sequences)
        if longest > limit:
            raise ValueError(f"a sequence has {longest} tokens, the teacher takes {limit}")
        # Sequences of like length share a pass, so that one does not wait for attention over the other.
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids))
        found: dict[int, TeacherRows] = {}
        group: list[int] = []
        for index in order:
            if group and not self._fits([*group, index], sequences):
                found |= self._run(group, sequences)
                on_tokens(sum(len(sequences[i].ids) for i in group))
                group = []
            group.append(index)
        found |= self._run(group, sequences)
        on_tokens(sum(len(sequences[i].ids) for i in group))
        return [found[i] for i in range(len(sequences))]

    def _fits(self, group: Sequence[int], sequences: Sequence[TokenSequence]) -> bool:
        lengths = [len(sequences[i].ids) for i in group]
        blocks = sum(-(-n // BLOCK_SIZE) for n in lengths)
        return sum(lengths) <= self._batch_tokens and blocks <= self._runner.num_blocks

    @torch.inference_mode()
    def _run(self, group: Sequence[int], sequences: Sequence[TokenSequence]) -> dict[int, TeacherRows]:
        chosen = [sequences[i] for i in group]
        batch, hidden = whole_sequences(chosen, self._runner.info.device), None
        if self._layered is not None:
            hidden, logits = self._layered.forward_with_states(batch)
        else:
            logits = self._runner.forward(batch)
        top = min(self._top, logits.shape[-1])
        values, ids = logits.topk(top, dim=-1)
        logprobs = values - torch.logsumexp(logits, dim=-1, keepdim=True)
        counts = [s.num_labels for s in chosen]
        states: list[npt.NDArray[np.float16] | None] = [None] * len(group)
        if hidden is not None:
            states = [s.numpy() for s in torch.split(normalised(hidden).half().cpu(), counts)]
        parts = zip(
            group, torch.split(ids.cpu(), counts), torch.split(logprobs.cpu(), counts), states, strict=True
        )
        return {
            i: TeacherRows(tokens.numpy().astype(np.int64), lp.numpy(), state)
            for i, tokens, lp, state in parts
        }


def whole_sequences(sequences: Sequence[TokenSequence], device: torch.device) -> RaggedBatch:
    """A pass over whole sequences from position 0, with the logits of every label (blocks from 0 on)."""
    lengths = [len(s.ids) for s in sequences]
    starts = [0, *np.cumsum(lengths).tolist()]
    blocks = [-(-n // BLOCK_SIZE) for n in lengths]
    tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    first = 0
    for row, count in enumerate(blocks):
        tables[row, :count] = torch.arange(first, first + count)
        first += count
    rows = [
        torch.arange(start + s.labels_from - 1, start + len(s.ids) - 1)
        for start, s in zip(starts, sequences, strict=False)
    ]
    return RaggedBatch(
        token_ids=torch.tensor([t for s in sequences for t in s.ids], device=device),
        positions=torch.cat([torch.arange(n) for n in lengths]).to(device),
        query_start=torch.tensor(starts, device=device),
        context_lens=torch.tensor(lengths, device=device),
        block_tables=tables.to(device),
        logit_rows=torch.cat(rows).to(device),
    )
