"""Questions of a benchmark: the built-in set and Spec-Bench's file, and a reproducible sample of either.

Spec-Bench (Xia et al., 2024, arXiv 2401.07851) has six task groups of 80 questions. Its first group is
MT-bench, whose eight categories are one group and whose questions have two turns.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.bench.prompts import PROMPTS

TASKS = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")
"""Spec-Bench's task groups, in its order. `mt_bench` is multi-turn conversation."""
_MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
_TASK_OF_CATEGORY: Mapping[str, str] = {**dict.fromkeys(_MT_BENCH, "mt_bench"), **{t: t for t in TASKS[1:]}}


class DatasetError(ValueError):
    """A data set cannot be read; the message names the file, the line and the fault."""


@dataclass(frozen=True, slots=True)
class Question:
    """User turns of one conversation; the assistant's turns come from the engine that is measured."""

    question_id: str
    task: str
    category: str
    turns: tuple[str, ...]


class _Line(BaseModel):
    """A line of Spec-Bench's `question.jsonl`. Fields without use here (references) are let through."""

    model_config = ConfigDict(extra="ignore")

    question_id: int | str
    category: str
    turns: tuple[str, ...] = Field(min_length=1)


def builtin() -> tuple[Question, ...]:
    """The prompts of this package: one turn each."""
    return tuple(Question(f"builtin-{i}", p.task, p.task, (p.text,)) for i, p in enumerate(PROMPTS))


def read_spec_bench(path: Path) -> tuple[Question, ...]:
    """Questions of a file in Spec-Bench's format, in its order. Raises DatasetError."""
    try:
        # Not splitlines: JSON strings may hold other line separators (U+2028, U+2029, U+0085).
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: {error}") from error
    questions = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = _Line.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise DatasetError(f"{path}:{number}: {where + ': ' if where else ''}{first['msg']}") from error
        task = _TASK_OF_CATEGORY.get(line.category)
        if task is None:
            raise DatasetError(f"{path}:{number}: unknown category {line.category!r}")
        questions.append(Question(str(line.question_id), task, line.category, line.turns))
    if not questions:
        raise DatasetError(f"{path}: holds no questions")
    return tuple(questions)


def sample(questions: Sequence[Question], per_task: int | None, seed: int) -> tuple[Question, ...]:
    """`per_task` questions of each group without replacement (all of a smaller group; None takes all), in an
    order in which the groups alternate. The choice within a group depends on `seed` and the group alone."""
    groups: list[list[Question]] = []
    for task in tasks_of(questions):
        group = [q for q in questions if q.task == task]
        if per_task is not None:
            group = random.Random(f"{seed}/{task}").sample(group, min(per_task, len(group)))
        groups.append(group)
    longest = max(map(len, groups), default=0)
    return tuple(group[i] for i in range(longest) for group in groups if i < len(group))


def tasks_of(questions: Iterable[Question]) -> tuple[str, ...]:
    """Task groups that occur, in Spec-Bench's order."""
    present = {q.task for q in questions}
    return tuple(t for t in TASKS if t in present)
