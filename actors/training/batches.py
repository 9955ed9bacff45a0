"""From sequences to packed batches. The batch of a step is a pure function of seed, data and step number, so
that a resumed run sees what an uninterrupted one would have seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.training.corpus import Example

_WIDTHS = 64


@dataclass(frozen=True, slots=True)
class TeacherBatch:
    """One teacher's rows for the batch's labels: ids int64 [N, k] in the draft's vocabulary (-1: not in it),
    logprobs float32 [N, k]."""

    ids: Tensor
    logprobs: Tensor

    def to(self, device: torch.device) -> TeacherBatch:
        return TeacherBatch(self.ids.to(device), self.logprobs.to(device))


@dataclass(frozen=True, slots=True)
class Batch:
    """ids, positions, sequence: int64 [B, L] (see `SortedStudent.forward`; padding is sequence -1).

    Label n (int64 [N], in the draft's vocabulary, -1: not in it) is predicted at row rows[n], column
    columns[n]. states: float16 [B, L, H], of the target where it emitted a token, zeros where there is none:
    the state of a token is the target's last hidden state at the token before. withheld: bool [B, L], where
    an online teacher is to find them: tokens without one, those of prompts and padding among them.
    numbers: which rows of the plan these are, if they are any.
    """

    ids: Tensor
    positions: Tensor
    sequence: Tensor
    rows: Tensor
    columns: Tensor
    labels: Tensor
    teachers: tuple[TeacherBatch, ...] = ()
    states: Tensor | None = None
    withheld: Tensor | None = None
    numbers: tuple[int, ...] = ()

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        teachers, numbers = tuple(t.to(device) for t in moved.pop("teachers")), moved.pop("numbers")
        placed: dict[str, Any] = {k: None if v is None else v.to(device) for k, v in moved.items()}
        return Batch(**placed, teachers=teachers, numbers=numbers)


def pack_rows(lengths: Sequence[int], order: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Indices of sequences by row, first fit in the given order over the rows that still have room."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room, row)
    for index in order:
        need = min(lengths[index], row_tokens)
        place = next((i for i, (room, _) in enumerate(open_rows) if room >= need), None)
        if place is None:
            rows.append([index])
            open_rows.append((row_tokens - need, len(rows) - 1))
            open_rows = open_rows[-16:]
        else:
            room, row = open_rows[place]
            rows[row].append(index)
            open_rows[place] = (room - need, row)
    return rows


class BatchPlan:
    """Which rows make up a step: packed once, in a fresh order every epoch, an incomplete last batch left
    out.

    Raises ValueError when the data does not fill one batch.
    """

    def __init__(self, lengths: Sequence[int], batch_rows: int, row_tokens: int, seed: int) -> None:
        self._batch_rows, self._seed = batch_rows, seed
        order = np.random.default_rng((seed, 0)).permutation(len(lengths)).tolist()
        self.packed = pack_rows(lengths, order, row_tokens)
        """Sequences by row. A row stays what it is, so that what was found out about it may be kept."""
        if len(self.packed) < batch_rows:
            raise ValueError(f"the data fills {len(self.packed)} rows, a batch takes {batch_rows}")
        self._epoch, self._order = 0, self._shuffle(0)

    def _shuffle(self, epoch: int) -> list[int]:
        if epoch == 0:  # packing was in random order already
            return list(range(len(self.packed)))
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self.packed))
        return [int(number) for number in order]

    def numbers(self, step: int) -> list[int]:
        """The rows of a step, as indices of `packed`; 0 is the first step."""
        epoch, place = divmod(step, len(self.packed) // self._batch_rows)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffle(epoch)
        return self._order[place * self._batch_rows : (place + 1) * self._batch_rows]

    def rows(self, step: int) -> list[list[int]]:
        """The sequences of a step's rows."""
        return [self.packed[number] for number in self.numbers(step)]


def build_batch(
    examples: Sequence[Example],
    rows: Sequence[Sequence[int]],
    row_tokens: int,
    *,
    offsets: np.random.Generator | None = None,
    max_offset: int = 0,
    anchors: int = 0,
    withheld: float = 0.0,
    mark_withheld: bool = False,
) -> Batch:
    """Lay examples out. With `offsets`, the positions of a sequence but its first `anchors` tokens are
    shifted by a random distance of at most `max_offset` (LongSpec's anchor-offset indices, arXiv
    2502.17421), and `withheld` of the tokens with states lose them (see `withhold`), or are marked."""
    longest = max(sum(min(len(examples[i].ids), row_tokens) for i in row) for row in rows)
    # Few different widths: what is compiled is compiled for one.
    width = min(row_tokens, -(-longest // _WIDTHS) * _WIDTHS)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    sequence = torch.full_like(ids, -1)
    first = examples[0].states
    states = None if first is None else torch.zeros(*ids.shape, first.shape[1], dtype=first.dtype)
    marks = torch.ones_like(ids, dtype=torch.bool) if mark_withheld else None
    at_row: list[Tensor] = []
    at_column: list[Tensor] = []
    chosen: list[tuple[Example, int]] = []
    for r, row in enumerate(rows):
        start = 0
        for place, index in enumerate(row):
            example = examples[index]
            length = min(len(example.ids), row_tokens)
            span = slice(start, start + length)
            ids[r, span] = example.ids[:length]
            sequence[r, span] = place
            where = torch.arange(length)
            if offsets is not None and max_offset:
                where[anchors:] += int(offsets.integers(0, max_offset + 1))
            positions[r, span] = where
            count = max(0, length - example.labels_from)
            labelled = slice(start + example.labels_from, start + length)
            at_row.append(torch.full((count,), r))
            at_column.append(torch.arange(labelled.start - 1, labelled.start - 1 + count))
            chosen.append((example, count))
            gone = torch.zeros(count, dtype=torch.bool)
            if offsets is not None and withheld and (mark_withheld or example.states is not None):
                gone = withhold(count, withheld, offsets)
            if states is not None and example.states is not None:
                states[r, labelled] = example.states[:count] * ~gone[:, None]
            if marks is not None:
                marks[r, labelled] = gone
            start += length
    labels = torch.cat([example.labels[:count] for example, count in chosen])
    teachers = tuple(
        TeacherBatch(
            torch.cat([example.teachers[t].ids[:count] for example, count in chosen]).long(),
            torch.cat([example.teachers[t].logprobs[:count] for example, count in chosen]).float(),
        )
        for t in range(len(examples[0].teachers))
    )
    return Batch(
        ids, positions, sequence, torch.cat(at_row), torch.cat(at_column), labels, teachers, states, marks
    )


LONGEST_RUN = 4


def withhold(count: int, share: float, generator: np.random.Generator) -> Tensor:
    """bool [count]: tokens that a draft is to see without the target's states, as it sees its own guesses: of
    share / 2 of the sequences all, of the others about `share`, in runs of 1 .. LONGEST_RUN, each followed by
    one token with states: 5/7 of them at most."""
    if generator.random() < share / 2:
        return torch.ones(count, dtype=torch.bool)
    mean = (1 + LONGEST_RUN) / 2
    # Of a run, at a token outside one. On average 1 / begin such tokens, that which ends the last run among
    # them, precede the `mean` tokens of a run.
    begin = min(1.0, share / (mean * (1 - share)))
    cycles = count // 2 + 1  # each is two tokens at least: a run, and what follows it
    spans = np.empty((cycles, 3), dtype=np.int64)
    spans[:, 0] = generator.geometric(begin, cycles) - 1
    spans[:, 1] = generator.integers(1, LONGEST_RUN + 1, cycles)
    spans[:, 2] = 1
    gone = np.repeat(np.tile(np.array([False, True, False]), cycles), spans.ravel())
    return torch.from_numpy(gone[:count])
