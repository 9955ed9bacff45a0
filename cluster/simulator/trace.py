"""Recorded traces: what a target answered, what each exit of a draft would have drafted at every place of the
answers, and what rounds and draft steps cost. One safetensors file whose metadata holds the card.

Under greedy decoding a draft token is accepted exactly when it equals the target's, so a trace tells what any
sequence of exits and lengths would have had accepted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from actors.files import complete_or_absent

TRACE_VERSION = 1
NOTHING = -1
"""Fills drafts that are shorter than the chain."""

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


class TraceError(ValueError):
    """A trace cannot be read or written; the message names the file and the fault."""


class TraceCard(BaseModel):
    """What a trace was recorded from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = Field(TRACE_VERSION, description="Of the format.")
    target: str = Field(description="Name and dtype of the target.")
    source: str = Field(description="The target's weights, as in the server's configuration.")
    dtype: str = Field(description="Precision of the target.")
    draft: str = Field(description="Artifact, or source, of the nested draft.")
    draft_hash: str = Field(description="SHA-256 of the artifact's file, empty without one.")
    tokenizer_hash: str = Field(description="Of the target's vocabulary.")
    dataset: str = Field(description="builtin or spec-bench.")
    dataset_hash: str = Field(description="SHA-256 of the data set's questions.")
    tasks: tuple[str, ...] = Field(description="Task group of each answer.")
    exits: tuple[int, ...] = Field(min_length=1, description="Exit depths in layers, ascending.")
    chain: int = Field(ge=1, description="Tokens drafted at each place.")
    verify_s: dict[int, float] = Field(min_length=1, description="Seconds of a round by rows.")
    step_s: dict[int, dict[int, float]] = Field(description="Seconds of a draft step, by exit and sessions.")
    machine: dict[str, Any] = Field(default_factory=dict, description="Where it was recorded.")
    content_hash: str = Field("", description="SHA-256 of the arrays.")


@dataclass(frozen=True, slots=True, eq=False)
class TracedAnswer:
    """One greedy answer of n tokens.

    candidates: int32 [n, k], the target's most probable ids where it emitted each token, best first.
    drafts: by exit, int32 [n, L]: the chain drafted once the first i tokens were emitted, row 0 unused.
    confidence: by exit, float32 [n, L], probability that a token is accepted if those before it are.
    """

    task: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    candidates: Ints
    drafts: Mapping[int, Ints]
    confidence: Mapping[int, Floats]

    def __post_init__(self) -> None:
        count = len(self.token_ids)
        arrays = (self.candidates, *self.drafts.values(), *self.confidence.values())
        if not self.prompt_ids or not count or any(len(a) != count for a in arrays):
            raise ValueError("an answer needs a prompt, tokens, and one row a token in every array")


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    card: TraceCard
    answers: tuple[TracedAnswer, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.card.tasks))

    def of(self, task: str) -> tuple[TracedAnswer, ...]:
        return tuple(a for a in self.answers if a.task == task)


def save_trace(trace: Trace, path: Path) -> TraceCard:
    """Returns the card as written, with its hash. Raises OSError."""
    answers = trace.answers
    arrays: dict[str, npt.NDArray[Any]] = {
        "prompt_len": np.array([len(a.prompt_ids) for a in answers], np.int32),
        "answer_len": np.array([len(a.token_ids) for a in answers], np.int32),
        "prompts": np.array([t for a in answers for t in a.prompt_ids], np.int32),
        "tokens": np.array([t for a in answers for t in a.token_ids], np.int32),
        "candidates": np.concatenate([a.candidates for a in answers]),
    }
    for depth in trace.card.exits:
        arrays[f"draft.{depth}"] = np.concatenate([a.drafts[depth] for a in answers])
        arrays[f"confidence.{depth}"] = np.concatenate([a.confidence[depth] for a in answers])
    card = trace.card.model_copy(update={"content_hash": _hash(arrays)})
    with complete_or_absent(path) as partial:
        save_file(arrays, partial, {"card": card.model_dump_json()})
    return card


def load_trace(path: Path) -> Trace:
    """Raises TraceError for what is no trace, has another version or was changed."""
    try:
        with safe_open(path, "numpy") as file:
            card = TraceCard.model_validate_json((file.metadata() or {}).get("card", ""))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise TraceError(f"{path}: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise TraceError(f"{path}: card.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if card.version != TRACE_VERSION:
        raise TraceError(f"{path}: version {card.version}, need {TRACE_VERSION}")
    if _hash(arrays) != card.content_hash:
        raise TraceError(f"{path}: content_hash does not match the arrays")
    return Trace(card, tuple(_answers(card, arrays)))


def _answers(card: TraceCard, arrays: Mapping[str, npt.NDArray[Any]]) -> Sequence[TracedAnswer]:
    result = []
    prompt_at = at = 0
    for task, prompt_len, count in zip(
        card.tasks, arrays["prompt_len"].tolist(), arrays["answer_len"].tolist(), strict=True
    ):
        rows = slice(at, at + count)
        result.append(
            TracedAnswer(
                task,
                tuple(arrays["prompts"][prompt_at : prompt_at + prompt_len].tolist()),
                tuple(arrays["tokens"][rows].tolist()),
                arrays["candidates"][rows],
                {depth: arrays[f"draft.{depth}"][rows] for depth in card.exits},
                {depth: arrays[f"confidence.{depth}"][rows] for depth in card.exits},
            )
        )
        prompt_at, at = prompt_at + prompt_len, at + count
    return result


def _hash(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].dtype}{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
