"""Token sequences on disk: shards of safetensors with a card beside them, written whole or not at all.

A label is a token that training predicts: those of a sequence from index `labels_from` on. Teachers store
their log-probabilities label by label, in the same shards and order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from actors.files import complete_or_absent

DATA_CARD, TEACHER_CARD = "dataset.json", "teacher.json"
_MADE_OF = "made_of"
"""In a shard's metadata. One value: several would have no fixed order, and shards are hashed."""
SMALL_VOCABULARY = 1 << 16
Ids = npt.NDArray[np.int64]
T = TypeVar("T", bound=BaseModel)


class DataError(ValueError):
    """A data set is missing, damaged or does not fit; the message names the folder."""


class _CardModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataCard(_CardModel):
    """`made_with` is a digest of the settings and of texts, so that only the same run continues a folder."""

    format: int = 1
    name: str
    kind: str
    model: str
    source_hash: str
    tokenizer_hash: str
    vocab_size: int
    made_with: str
    settings: dict[str, Any]


class TeacherCard(_CardModel):
    format: int = 1
    name: str
    source_hash: str
    tokenizer_hash: str
    top: int
    data_hash: str
    """`made_with` of the data set that the rows belong to."""
    states: int = 0
    """Width of the states stored beside the rows; 0 for none."""


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """ids: the whole conversation. Labels are ids[labels_from:]. greedy: the answer is the model's argmax."""

    ids: tuple[int, ...]
    labels_from: int
    greedy: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.labels_from < len(self.ids):
            raise ValueError("a sequence needs at least one token before its labels, and a label")

    @property
    def num_labels(self) -> int:
        return len(self.ids) - self.labels_from


@dataclass(frozen=True, slots=True)
class SequenceTable:
    """Many sequences in few arrays: ids [tokens] (uint16 or uint32), starts int64 [n + 1], labels_from int32
    [n], greedy bool [n]."""

    ids: npt.NDArray[np.unsignedinteger[Any]]
    starts: npt.NDArray[np.int64]
    labels_from: npt.NDArray[np.int32]
    greedy: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.labels_from)

    def sequence(self, index: int) -> TokenSequence:
        ids = self.ids[self.starts[index] : self.starts[index + 1]].tolist()
        return TokenSequence(tuple(ids), int(self.labels_from[index]), bool(self.greedy[index]))

    def sequences(self) -> list[TokenSequence]:
        return [self.sequence(index) for index in range(len(self))]

    @property
    def labels(self) -> list[int]:
        """How many each sequence has."""
        counts: list[int] = (np.diff(self.starts) - self.labels_from).tolist()
        return counts

    @property
    def digest(self) -> str:
        """SHA-256 of the ids and of where sequences and their labels begin."""
        arrays = (self.ids, self.starts, self.labels_from)
        return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def table_of(sequences: Sequence[TokenSequence], vocab_size: int) -> SequenceTable:
    lengths = [len(s.ids) for s in sequences]
    flat = [token for s in sequences for token in s.ids]
    return SequenceTable(
        np.array(flat, dtype=id_type(vocab_size)),
        np.array([0, *np.cumsum(lengths, dtype=np.int64)], dtype=np.int64),
        np.array([s.labels_from for s in sequences], dtype=np.int32),
        np.array([s.greedy for s in sequences], dtype=np.bool_),
    )


def joined(tables: Sequence[SequenceTable]) -> SequenceTable:
    """One table of all, in order; at least one."""
    offsets = np.cumsum([0, *(len(t.ids) for t in tables)])
    starts = [t.starts[:-1] + offset for t, offset in zip(tables, offsets, strict=False)]
    return SequenceTable(
        np.concatenate([t.ids for t in tables]),
        np.concatenate([*starts, offsets[-1:]]),
        np.concatenate([t.labels_from for t in tables]),
        np.concatenate([t.greedy for t in tables]),
    )


@dataclass(frozen=True, slots=True)
class TeacherRows:
    """ids [labels, k] int64 and log-probabilities [labels, k] float32 (natural log), best first. states:
    float16 [labels, H], the teacher's last hidden state where it predicted the label, before its final norm,
    divided by its root mean square; None when they were not asked for."""

    ids: Ids
    logprobs: npt.NDArray[np.float32]
    states: npt.NDArray[np.float16] | None = None


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.safetensors"


def shard_count(folder: Path) -> int:
    """n of the shards 0 .. n - 1. Raises DataError when one of them is missing before the last."""
    there = {path.name for path in folder.glob("shard-*.safetensors")}
    for index in range(len(there)):
        if shard_path(folder, index).name not in there:
            raise DataError(f"{folder}: shard {index} is missing")
    return len(there)


def id_type(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if vocab_size <= SMALL_VOCABULARY else np.uint32


def write_card(folder: Path, name: str, card: BaseModel) -> None:
    """Write the card of a folder. Raises DataError when another run's card is there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    text = json.dumps(card.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise DataError(f"{folder} holds data of other settings ({name}): choose another folder")
    _write(path, text.encode())


def read_data_card(folder: Path) -> DataCard:
    return _read_card(folder, DATA_CARD, DataCard)


def read_teacher_card(folder: Path) -> TeacherCard:
    return _read_card(folder, TEACHER_CARD, TeacherCard)


def _read_card(folder: Path, name: str, kind: type[T]) -> T:
    try:
        return kind.model_validate_json((folder / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{folder} holds no {name}: {error.strerror or error}") from error
    except ValidationError as error:
        raise DataError(
            f"{folder / name} is not valid: {error.errors(include_url=False)[0]['msg']}"
        ) from error


def _write(path: Path, data: bytes) -> None:
    with complete_or_absent(path) as partial:
        partial.write_bytes(data)


def write_sequences(
    path: Path, sequences: Sequence[TokenSequence], vocab_size: int, made_of: str = ""
) -> None:
    """`made_of`: what the sequences were made of, kept with them for `read_made_of`."""
    write_table(path, table_of(sequences, vocab_size), made_of)


def write_table(path: Path, table: SequenceTable, made_of: str = "") -> None:
    tensors = {
        "ids": table.ids,
        "starts": table.starts,
        "labels_from": table.labels_from,
        "greedy": table.greedy.astype(np.uint8),
    }
    _write(path, save(tensors, {_MADE_OF: made_of} if made_of else None))


def read_made_of(path: Path) -> str:
    """What a shard says it was made of, "" if nothing. Raises DataError."""
    try:
        with safe_open(path, framework="numpy") as file:
            return str((file.metadata() or {}).get(_MADE_OF, ""))
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def read_sequences(path: Path) -> list[TokenSequence]:
    return read_table(path).sequences()


def read_table(path: Path) -> SequenceTable:
    tensors = _load(path)
    greedy = tensors["greedy"].astype(np.bool_)
    return SequenceTable(tensors["ids"], tensors["starts"], tensors["labels_from"], greedy)


def write_teacher(
    path: Path, rows: Sequence[TeacherRows], sequences: Sequence[TokenSequence], vocab_size: int
) -> None:
    """Rows of each of a shard's sequences, in order. Log-probabilities are kept in float16."""
    width = max((r.ids.shape[1] for r in rows), default=0)
    ids = np.concatenate([r.ids for r in rows]) if rows else np.zeros((0, width), np.int64)
    logprobs = np.concatenate([r.logprobs for r in rows]) if rows else np.zeros((0, width), np.float32)
    counts = np.array([len(r.ids) for r in rows], dtype=np.int32)
    stored = {
        "ids": ids.astype(id_type(vocab_size)),
        "logprobs": logprobs.astype(np.float16),
        "counts": counts,
    }
    states = [r.states for r in rows if r.states is not None]
    if states:
        stored["states"] = np.concatenate(states)
    _write(path, save(stored, {_MADE_OF: table_of(sequences, vocab_size).digest}))


def is_teacher_of(path: Path, table: SequenceTable) -> bool:
    """Whether there are rows, and for these sequences. Raises DataError for a file that cannot be read."""
    return path.is_file() and read_made_of(path) == table.digest


def read_teacher(path: Path, table: SequenceTable, *, states: bool = False) -> list[TeacherRows]:
    """Rows of each of a shard's sequences, with states when asked for. Raises DataError when there are not as
    many rows as labels, when they were made for other sequences, and when there are no states."""
    tensors = _load(path)
    # Where there are no labels there are no states either.
    if states and len(table) and "states" not in tensors:
        raise DataError(f"{path} holds no states: they are made by s2d draft teach --states")
    if tensors["counts"].tolist() != table.labels:
        raise DataError(f"{path} does not hold one row for each label of its shard")
    if not is_teacher_of(path, table):
        raise DataError(f"{path} was made for other sequences: make it again")
    ends = np.cumsum(tensors["counts"], dtype=np.int64)
    ids, logprobs = tensors["ids"].astype(np.int64), tensors["logprobs"].astype(np.float32)
    return [
        TeacherRows(
            ids[end - n : end],
            logprobs[end - n : end],
            tensors["states"][end - n : end] if states else None,
        )
        for end, n in zip(ends, tensors["counts"], strict=True)
    ]


def _load(path: Path) -> dict[str, Any]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def iter_tables(folder: Path) -> Iterator[tuple[int, SequenceTable]]:
    """Every shard of a data set. Raises DataError when there is none."""
    count = shard_count(folder)
    if not count:
        raise DataError(f"{folder} holds no shard yet")
    for index in range(count):
        yield index, read_table(shard_path(folder, index))


def iter_shards(folder: Path) -> Iterator[tuple[int, list[TokenSequence]]]:
    """`iter_tables`, sequence by sequence."""
    for index, table in iter_tables(folder):
        yield index, table.sequences()


def content_hash(folders: Sequence[Path]) -> str:
    """SHA-256 over the shards, in order."""
    digest = hashlib.sha256()
    for folder in folders:
        for index in range(shard_count(folder)):
            digest.update(hashlib.sha256(shard_path(folder, index).read_bytes()).digest())
    return digest.hexdigest()
