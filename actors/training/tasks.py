"""User turns for tasks. A model that talks to itself (Magpie) rarely asks to translate, to summarise, to
answer from a text or to solve a word problem; these prompts do, around texts that the model wrote itself.

Everything is drawn from templates with a seed: no question of a benchmark is among them.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actors.training import task_templates as t

SHORTEST, LONGEST = 200, 900
"""Characters of a passage."""


@dataclass(frozen=True, slots=True)
class TaskPrompt:
    task: str
    prompt: str


class TaskWriter:
    """Writes prompts about passages of `texts`.

    Raises ValueError when none of the texts holds a passage of `SHORTEST` characters, or none of the passages
    a sentence to translate.
    """

    def __init__(self, texts: Sequence[str], seed: int) -> None:
        self._random = random.Random(seed)
        self._passages = [p for text in texts if len(p := passage(text)) >= SHORTEST]
        if not self._passages:
            raise ValueError(f"no text has a passage of {SHORTEST} characters")
        if not any(map(_middling, self._passages)):
            raise ValueError("no passage has a sentence to translate, of 30 to 250 characters")
        self._tasks: dict[str, Callable[[], str]] = {
            "chat": self._chat,
            "translation": self._translation,
            "summarization": self._summary,
            "qa": self._question,
            "math": self._math,
            "rag": self._from_passages,
        }

    def prompts(self, count: int) -> list[TaskPrompt]:
        """`count` different prompts, tasks in turn; a task that has no more of them is left out from there
        on. Raises ValueError when none has."""
        written: dict[str, TaskPrompt] = {}
        waiting = deque(self._tasks)
        while len(written) < count:
            if not waiting:
                raise ValueError(f"there are no {count} different prompts, only {len(written)}")
            task = waiting.popleft()
            for _ in range(1000):
                prompt = self._tasks[task]()
                if prompt not in written:
                    written[prompt] = TaskPrompt(task, prompt)
                    waiting.append(task)
                    break
        return list(written.values())

    def _pick(self, values: Sequence[str]) -> str:
        return self._random.choice(values)

    def _passage(self) -> str:
        return self._pick(self._passages)

    def _sentence(self) -> str:
        while not (sentences := _middling(self._passage())):
            pass  # the constructor saw a passage that has some
        return self._pick(sentences)

    def _chat(self) -> str:
        return self._pick(t.INSTRUCTIONS).format(
            topic=self._pick(t.TOPICS), place=self._pick(t.PLACES), job=self._pick(t.JOBS),
            code=self._pick(t.CODE), language=self._pick(t.PROGRAMMING),
        )  # fmt: skip

    def _translation(self) -> str:
        if self._random.random() < 0.5:
            name, grammar = self._random.choice(t.GRAMMARS)
            source = " ".join(self._clause(grammar) for _ in range(self._random.randint(1, 2)))
            return self._pick(t.TRANSLATE).format(source=name, target="English", text=source)
        target = self._pick(t.LANGUAGES)
        return self._pick(t.TRANSLATE).format(source="English", target=target, text=self._sentence())

    def _clause(self, grammar: Sequence[Sequence[str]]) -> str:
        text = " ".join(self._pick(slot) for slot in grammar)
        return text[0].upper() + text[1:] + "."

    def _summary(self) -> str:
        return self._pick(t.SUMMARISE).format(text=self._passage())

    def _question(self) -> str:
        return self._pick(t.QUESTIONS).format(
            topic=self._pick(t.TOPICS), place=self._pick(t.PLACES), person=self._pick(t.PEOPLE),
            thing=self._pick(t.THINGS),
        )  # fmt: skip

    def _math(self) -> str:
        number = self._random.randint
        return self._pick(t.WORD_PROBLEMS).format(
            name=self._pick(t.NAMES), item=self._pick(t.ITEMS), a=number(2, 12) * 5, b=number(2, 20),
            c=number(2, 9), d=number(2, 6), price=number(2, 40), percent=number(1, 9) * 10,
        )  # fmt: skip

    def _from_passages(self) -> str:
        passages = [self._passage() for _ in range(self._random.randint(1, 2))]
        subject = self._pick(split_sentences(self._pick(passages))).rstrip(".!?:")
        return self._pick(t.FROM_PASSAGES).format(
            text="\n\n".join(passages), subject=" ".join(subject.split()[:10])
        )


def passage(text: str) -> str:
    """The text from its start, whole sentences, `LONGEST` characters at most."""
    kept = ""
    for sentence in split_sentences(text):
        if len(kept) + len(sentence) > LONGEST:
            break
        kept = f"{kept} {sentence}".strip()
    return kept


def _middling(text: str) -> list[str]:
    """Sentences worth translating."""
    return [s for s in split_sentences(text) if 30 <= len(s) <= 250]


def split_sentences(text: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if s]
