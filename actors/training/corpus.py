"""A data set in memory, ready to batch: labels and teachers in the draft's vocabulary, training and held-out
sequences apart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.training.token_store import (
    DataCard,
    DataError,
    SequenceTable,
    TeacherCard,
    TeacherRows,
    TokenSequence,
    iter_tables,
    joined,
    read_data_card,
    read_teacher,
    read_teacher_card,
    shard_path,
)


@dataclass(frozen=True, slots=True)
class ExampleTeacher:
    """ids int32 [labels, k] (draft vocabulary, -1: not in it), logprobs float16 [labels, k]."""

    ids: Tensor
    logprobs: Tensor


@dataclass(frozen=True, slots=True)
class Example:
    """ids: int64 [L]; labels: int64 [L - labels_from], in the draft's vocabulary, -1: not in it. states:
    float16 [L - labels_from, H], the target's where it emitted each label, None for a draft without."""

    ids: Tensor
    labels_from: int
    labels: Tensor
    teachers: tuple[ExampleTeacher, ...] = ()
    states: Tensor | None = None


@dataclass(frozen=True, slots=True)
class RawCorpus:
    """Sequences of one or several data sets and their teachers as stored; `rows[t][i]` are teacher t's of
    sequence i. `vocab_size`: of the target."""

    cards: tuple[DataCard, ...]
    vocab_size: int
    table: SequenceTable
    teacher_cards: tuple[TeacherCard, ...]
    rows: tuple[list[TeacherRows], ...]

    @property
    def sequences(self) -> list[TokenSequence]:
        return self.table.sequences()

    def is_heldout(self, share: float) -> npt.NDArray[np.bool_]:
        """bool [n]: see `is_heldout`."""
        t = self.table
        return np.array(
            [
                _falls_below(share, t.ids[start:end], first)
                for start, end, first in zip(
                    t.starts[:-1].tolist(), t.starts[1:].tolist(), t.labels_from.tolist(), strict=True
                )
            ],
            dtype=np.bool_,
        )


def read_corpus(folders: Sequence[Path], teachers: Sequence[Path] = (), *, states: bool = False) -> RawCorpus:
    """Everything in data sets and in their teachers, with the first teacher's states when asked for. Each
    data set needs the same teachers, in the same order. Raises DataError when they do not belong together."""
    cards = tuple(read_data_card(folder) for folder in folders)
    for folder, card in zip(folders, cards, strict=True):
        if card.tokenizer_hash != cards[0].tokenizer_hash:
            raise DataError(
                f"{folder} has the tokenizer {card.tokenizer_hash[:12]}, "
                f"{folders[0]} {cards[0].tokenizer_hash[:12]}"
            )
    of_set = _teachers_of(folders, cards, teachers)
    tables: list[SequenceTable] = []
    rows: tuple[list[TeacherRows], ...] = tuple([] for _ in of_set[0])
    for folder, paths in zip(folders, of_set, strict=True):
        for index, table in iter_tables(folder):
            tables.append(table)
            for place, (path, _) in enumerate(paths):
                first = states and place == 0
                rows[place].extend(read_teacher(shard_path(path, index), table, states=first))
    teacher_cards = tuple(teacher for _, teacher in of_set[0])
    return RawCorpus(cards, cards[0].vocab_size, joined(tables), teacher_cards, rows)


def _teachers_of(
    folders: Sequence[Path], cards: Sequence[DataCard], teachers: Sequence[Path]
) -> list[list[tuple[Path, TeacherCard]]]:
    """The teachers of each data set, in the order given."""
    found: list[list[tuple[Path, TeacherCard]]] = [[] for _ in folders]
    places = {card.made_with: place for place, card in enumerate(cards)}
    for path in teachers:
        teacher = read_teacher_card(path)
        place = places.get(teacher.data_hash)
        if place is None:
            known = ", ".join(f"{f} ({c.name})" for f, c in zip(folders, cards, strict=True))
            raise DataError(f"the teacher {path} belongs to another data set than {known}")
        if teacher.tokenizer_hash != cards[place].tokenizer_hash:
            raise DataError(
                f"the teacher {path} ({teacher.name}) has the tokenizer {teacher.tokenizer_hash[:12]}, "
                f"{folders[place]} {cards[place].tokenizer_hash[:12]}"
            )
        found[place].append((path, teacher))
    names = [[(teacher.name, teacher.source_hash) for _, teacher in of_one] for of_one in found]
    for folder, mine in zip(folders, names, strict=True):
        if mine != names[0]:
            ours, first = ([name for name, _ in side] or "none" for side in (mine, names[0]))
            raise DataError(f"{folder} has the teachers {ours}, {folders[0]} has {first}")
    return found


def is_heldout(sequence: TokenSequence, share: float) -> bool:
    """Decided by a sequence's prompt alone, so that more data moves none across and no prompt is on both
    sides."""
    return _falls_below(share, np.array(sequence.ids), sequence.labels_from)


def _falls_below(share: float, ids: npt.NDArray[Any], labels_from: int) -> bool:
    # Plain text has no prompt.
    prompt = (ids if labels_from < 2 else ids[:labels_from]).astype(np.int64)
    value = int.from_bytes(hashlib.sha256(prompt.tobytes()).digest()[:8], "little")
    return value < share * 2**64


def draft_vocabulary(table: SequenceTable, indices: Sequence[int], size: int, vocab_size: int) -> Tensor:
    """int64 [D], ascending: the most frequent label tokens of some sequences (FR-Spec, arXiv 2502.14856); of
    equally frequent ones, and to fill up, lower ids first (in byte-pair vocabularies those are the more
    common). 0: all."""
    if size == 0 or size >= vocab_size:
        return torch.arange(vocab_size)
    lengths = np.diff(table.starts)
    chosen = np.zeros(len(table), dtype=np.bool_)
    chosen[list(indices)] = True
    place = np.arange(len(table.ids)) - np.repeat(table.starts[:-1], lengths)
    label = (place >= np.repeat(table.labels_from, lengths)) & np.repeat(chosen, lengths)
    counts = np.bincount(table.ids[label], minlength=vocab_size)
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:size]))


def build_examples(corpus: RawCorpus, indices: Sequence[int], head_ids: Tensor) -> list[Example]:
    """Sequences in the draft's vocabulary. One of its ids is a row of the head."""
    row_of = torch.full((corpus.vocab_size,), -1, dtype=torch.int64)
    row_of[head_ids] = torch.arange(len(head_ids))
    examples: list[Example] = []
    # All at once, and then views: there may be a hundred thousand sequences.
    flat = torch.from_numpy(corpus.table.ids.astype(np.int64))
    labels = row_of[flat]
    starts, labels_from = corpus.table.starts.tolist(), corpus.table.labels_from.tolist()
    for index in indices:
        begin, end, first = starts[index], starts[index + 1], labels_from[index]
        teachers = tuple(
            ExampleTeacher(row_of[torch.from_numpy(rows[index].ids)].int(), _half(rows[index]))
            for rows in corpus.rows
        )
        states = corpus.rows[0][index].states if corpus.rows else None
        examples.append(
            Example(
                flat[begin:end],
                first,
                labels[begin + first : end],
                teachers,
                None if states is None else torch.from_numpy(states),
            )
        )
    return examples


def _half(rows: TeacherRows) -> Tensor:
    return torch.from_numpy(rows.logprobs).half()
