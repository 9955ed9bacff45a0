"""Questions of the benchmark: Spec-Bench's format, samples, the built-in set, prompts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from cluster.bench.datasets import TASKS, DatasetError, Question, builtin, read_spec_bench, sample, tasks_of
from cluster.bench.rendering import PromptRenderer
from tests.toy_tokenizers import byte_level_folder

CATEGORIES = (
    "writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities",
    "translation", "summarization", "qa", "math_reasoning", "rag",
)  # fmt: skip


def write(folder: Path, *lines: str) -> Path:
    file = folder / "question.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def line(number: int, category: str, *turns: str) -> str:
    return json.dumps({"question_id": number, "category": category, "turns": turns, "reference": ["x"]})


def test_categories_become_six_task_groups(tmp_path: Path) -> None:
    file = write(tmp_path, *(line(i, c, f"turn of {c}", "again") for i, c in enumerate(CATEGORIES)), "")
    questions = read_spec_bench(file)
    assert [q.category for q in questions] == list(CATEGORIES)
    assert Counter(q.task for q in questions) == {"mt_bench": 8, **dict.fromkeys(TASKS[1:], 1)}
    assert questions[3] == Question("3", "mt_bench", "math", ("turn of math", "again"))
    assert tasks_of(reversed(questions)) == TASKS


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{broken", "question.jsonl:2: Invalid JSON"),
        (line(1, "cooking", "x"), "question.jsonl:2: unknown category 'cooking'"),
        (line(1, "qa"), "question.jsonl:2: turns: Tuple should have at least 1 item"),
        ('{"category": "qa", "turns": ["x"]}', "question.jsonl:2: question_id"),
    ],
)
def test_faults_are_named_with_their_line(tmp_path: Path, bad: str, says: str) -> None:
    with pytest.raises(DatasetError, match="question") as error:
        read_spec_bench(write(tmp_path, line(0, "qa", "x"), bad))
    assert says in str(error.value)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_a_line_ends_at_a_line_feed_only(tmp_path: Path, separator: str) -> None:
    """JSON strings may hold what else separates lines of text."""
    text = f"one{separator}two"
    written = json.dumps({"question_id": 1, "category": "qa", "turns": [text]}, ensure_ascii=False)
    questions = read_spec_bench(write(tmp_path, written, line(2, "qa", "x")))
    assert [q.turns for q in questions] == [(text,), ("x",)]


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="No such file"):
        read_spec_bench(tmp_path / "nothing.jsonl")
    with pytest.raises(DatasetError, match="holds no questions"):
        read_spec_bench(write(tmp_path, ""))


def questions_of(**groups: int) -> list[Question]:
    return [Question(f"{t}-{i}", t, t, (f"{t} {i}",)) for t, count in groups.items() for i in range(count)]


def test_samples_are_reproducible_and_alternate_between_groups() -> None:
    questions = questions_of(qa=80, rag=80, translation=3)
    chosen = sample(questions, 10, seed=4)
    assert chosen == sample(questions, 10, seed=4)
    assert chosen != sample(questions, 10, seed=5)
    assert Counter(q.task for q in chosen) == {"translation": 3, "qa": 10, "rag": 10}
    assert [q.task for q in chosen[:6]] == ["translation", "qa", "rag"] * 2
    assert len(set(chosen)) == len(chosen)
    # What other groups hold does not change a group's sample.
    assert [q for q in chosen if q.task == "qa"] == list(sample(questions_of(qa=80), 10, seed=4))
    assert set(sample(questions, None, seed=0)) == set(questions)


def test_the_builtin_set_has_eight_prompts_a_group() -> None:
    questions = builtin()
    counts = Counter(q.task for q in questions)
    assert set(counts) == set(TASKS)
    assert min(counts.values()) >= 8
    assert len({q.turns for q in questions}) == len(questions)


def test_prompts_are_rendered_with_the_answers_between_the_turns(tmp_path: Path) -> None:
    renderer = PromptRenderer(byte_level_folder(tmp_path))
    first = renderer.render(("one", "two"))
    assert first.text == "<s>user: one\n<s>assistant: "
    assert first.ids[0] == 0  # the template's own beginning of sequence, and no second one
    assert first.ids.count(0) == 2
    second = renderer.render(("one", "two"), ["answer"])
    assert second.text == "<s>user: one\n<s>assistant: answer\n<s>user: two\n<s>assistant: "
    assert renderer.render(("one", "two")) is first
