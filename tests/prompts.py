"""Sixty varied prompts of our own: questions, code, lists, copying, several scripts, noise."""

from __future__ import annotations

import random

QUESTIONS = (
    "What is the capital of France?",
    "Explain how a bicycle stays upright.",
    "Why is the sky blue, in one sentence?",
    "Name three rivers in South America.",
    "How do I boil an egg so that the yolk stays soft?",
    "What does a compiler do?",
    "Give me a short definition of entropy.",
    "Who was Ada Lovelace?",
    "What is the difference between a list and a tuple in Python?",
    "Summarise the plot of Romeo and Juliet in two sentences.",
    "How many days are there in a leap year?",
    "What are the ingredients of a simple pancake?",
    "Write a haiku about autumn.",
    "Translate to French: The library opens at nine.",
    "Translate to Spanish: I would like a glass of water.",
    "Suggest a name for a small grey cat.",
    "What happens when water freezes?",
    "List five fruits in alphabetical order.",
    "What is 17 times 3?",
    "Write one polite sentence that declines an invitation.",
)

CODE = (
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "SELECT name, age FROM people WHERE age >",
    "for i in range(10):\n    print(i)\nfor i in range(10):\n    print(",
    "import os\nimport sys\nimport json\nimport",
    "<ul>\n  <li>one</li>\n  <li>two</li>\n  <li>",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    '{"name": "Ann", "age": 31}\n{"name": "Bob", "age": 28}\n{"name": "',
    "#include <stdio.h>\n\nint main(void) {\n    printf(",
    'git add .\ngit commit -m "first"\ngit',
    "x = [1, 2, 3]\ny = [v * 2 for v in x]\nz =",
)

REPETITIVE = (
    "one two three one two three one two three one two",
    "la la la la la la la la la la la la",
    "The cat sat on the mat. The cat sat on the mat. The cat sat on the",
    "A, B, C, D, A, B, C, D, A, B, C, D, A, B,",
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17",
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday Monday Tuesday",
    "item: apple\nitem: pear\nitem: plum\nitem: apple\nitem: pear\nitem:",
    "ababababababababababababab",
    "Repeat after me: the quick brown fox jumps over the lazy dog. The quick brown fox",
    "yes no yes no yes no yes no yes no",
    "= = = = = = = = = =",
    "Copy this exactly: alpha beta gamma delta epsilon.\nalpha beta gamma",
)

SCRIPTS = (
    "Bonjour, je m'appelle",
    "Guten Morgen! Heute ist das Wetter",
    "El perro de mi vecino",
    "こんにちは、私の名前は",
    "今天天气很好,我们去",
    "Привет, как дела?",
    "🙂🙃 emoji story: 🐱",
    "naïve café déjà vu",
)


def _noise(count: int) -> tuple[str, ...]:
    rng = random.Random(20260101)
    words = [
        "stone",
        "lamp",
        "green",
        "seven",
        "under",
        "glass",
        "north",
        "quiet",
        "paper",
        "ring",
        "blue",
        "salt",
    ]
    return tuple(" ".join(rng.choice(words) for _ in range(rng.randint(6, 40))) for _ in range(count))


NOISE = _noise(10)
ALL = (*QUESTIONS, *CODE, *REPETITIVE, *SCRIPTS, *NOISE)
assert len(ALL) == 60
