"""Prompts for tasks: all kinds, none twice, the same for the same seed, passages of whole sentences."""

from __future__ import annotations

from collections import Counter

import pytest

from actors.training import task_templates
from actors.training.tasks import LONGEST, TaskWriter, passage

TEXT = "The river rises in the hills above the old town. It is high in spring, and people fish in it. " * 4


TEXTS = [TEXT.replace("river", word) for word in ("river", "stream", "brook", "creek", "water", "flood")]


def test_tasks_come_in_turn_and_no_prompt_twice() -> None:
    prompts = TaskWriter(TEXTS, seed=1).prompts(120)
    assert Counter(p.task for p in prompts) == dict.fromkeys(
        ("chat", "translation", "summarization", "qa", "math", "rag"), 20
    )
    assert len({p.prompt for p in prompts}) == 120
    assert not any("{" in p.prompt for p in prompts)
    assert prompts == TaskWriter(TEXTS, seed=1).prompts(120)
    assert prompts != TaskWriter(TEXTS, seed=2).prompts(120)


def test_every_template_can_be_filled() -> None:
    """Ten thousand draws meet every one; a field that nobody fills would raise KeyError."""
    writer = TaskWriter([TEXT], seed=0)
    for draw in (writer._chat, writer._question, writer._math, writer._translation, writer._from_passages):
        seen = {draw() for _ in range(2000)}
        assert all(seen)
    starts = {text.split("{")[0] for text in task_templates.WORD_PROBLEMS}
    drawn = [writer._math() for _ in range(2000)]
    assert all(any(d.startswith(start) for d in drawn) for start in starts)


def test_a_passage_is_whole_sentences_and_no_longer() -> None:
    assert passage("One. Two  words.\nThree") == "One. Two words. Three"
    long = passage("A sentence of thirty letters. " * 100)
    assert LONGEST - 40 < len(long) <= LONGEST
    assert long.endswith(".")
    assert passage("x" * (LONGEST + 1)) == ""


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(ValueError, match="no text has a passage of 200 characters"):
        TaskWriter(["short."], seed=0)
    with pytest.raises(ValueError, match="no passage has a sentence to translate"):
        TaskWriter(["Far too short. " * 40], seed=0)


def test_a_task_that_has_no_more_is_left_out() -> None:
    writer = TaskWriter([TEXT], seed=0)
    prompts = writer.prompts(600)
    assert len({p.prompt for p in prompts}) == 600
    summaries = [i for i, p in enumerate(prompts) if p.task == "summarization"]
    assert 0 < len(summaries) < 60
    assert max(summaries) < 400
    writer._tasks = {"summarization": writer._summary}
    with pytest.raises(ValueError, match=r"no 600 different prompts, only \d"):
        writer.prompts(600)
