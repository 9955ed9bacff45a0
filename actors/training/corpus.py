"""A data set in memory, ready to batch: labels and teachers in the draft's vocabulary, training and held-out
sequences apart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from actors.training.token_store import (
    DataCard,
    DataError,
    TeacherCard,
    TeacherRows,
    TokenSequence,
    iter_shards,
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
    """ids: int64 [L]; labels: int64 [L - labels_from], in the draft's vocabulary, -1: not in it."""

    ids: Tensor
    labels_from: int
    labels: Tensor
    teachers: tuple[ExampleTeacher, ...] = ()


@dataclass(frozen=True, slots=True)
class RawCorpus:
    """Sequences and their teachers as stored; `rows[t][i]` are teacher t's of sequence i."""

    card: DataCard
    sequences: list[TokenSequence]
    teacher_cards: tuple[TeacherCard, ...]
    rows: tuple[list[TeacherRows], ...]


def read_corpus(folder: Path, teachers: Sequence[Path] = ()) -> RawCorpus:
    """Everything in a data set and in its teachers. Raises DataError when they do not belong together."""
    card = read_data_card(folder)
    cards = tuple(read_teacher_card(path) for path in teachers)
    for path, teacher in zip(teachers, cards, strict=True):
        if teacher.data_hash != card.made_with:
            raise DataError(f"the teacher {path} belongs to another data set than {folder} ({card.name})")
        if teacher.tokenizer_hash != card.tokenizer_hash:
            raise DataError(
                f"the teacher {path} ({teacher.name}) has the tokenizer {teacher.tokenizer_hash[:12]}, "
                f"{folder} {card.tokenizer_hash[:12]}"
            )
    sequences: list[TokenSequence] = []
    rows: tuple[list[TeacherRows], ...] = tuple([] for _ in teachers)
    for index, shard in iter_shards(folder):
        sequences += shard
        for kept, path in zip(rows, teachers, strict=True):
            kept += read_teacher(shard_path(path, index), shard)
    return RawCorpus(card, sequences, cards, rows)


def is_heldout(sequence: TokenSequence, share: float) -> bool:
    """Decided by a sequence's prompt alone, so that more data moves none across and no prompt is on both
    sides."""
    prompt = np.array(sequence.ids[: sequence.labels_from], dtype=np.int64)
    if sequence.labels_from < 2:  # plain text has no prompt
        prompt = np.array(sequence.ids, dtype=np.int64)
    value = int.from_bytes(hashlib.sha256(prompt.tobytes()).digest()[:8], "little")
    return value < share * 2**64


def draft_vocabulary(sequences: Sequence[TokenSequence], size: int, vocab_size: int) -> Tensor:
    """int64 [D], ascending: the most frequent label tokens (FR-Spec, arXiv 2502.14856); of equally frequent
    ones, and to fill up, lower ids first (in byte-pair vocabularies those are the more common). 0: all."""
    if size == 0 or size >= vocab_size:
        return torch.arange(vocab_size)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for sequence in sequences:
        np.add.at(counts, np.array(sequence.ids[sequence.labels_from :], dtype=np.int64), 1)
    chosen = np.argsort(-counts, kind="stable")[:size]
    return torch.from_numpy(np.sort(chosen))


def build_examples(corpus: RawCorpus, indices: Sequence[int], head_ids: Tensor) -> list[Example]:
    """Sequences in the draft's vocabulary. One of its ids is a row of the head."""
    row_of = torch.full((corpus.card.vocab_size,), -1, dtype=torch.int64)
    row_of[head_ids] = torch.arange(len(head_ids))
    examples: list[Example] = []
    for index in indices:
        sequence = corpus.sequences[index]
        ids = torch.tensor(sequence.ids, dtype=torch.int64)
        teachers = tuple(
            ExampleTeacher(row_of[torch.from_numpy(rows[index].ids)].int(), _half(rows[index]))
            for rows in corpus.rows
        )
        examples.append(Example(ids, sequence.labels_from, row_of[ids[sequence.labels_from :]], teachers))
    return examples


def _half(rows: TeacherRows) -> Tensor:
    return torch.from_numpy(rows.logprobs).half()
