"""Conversations and prompts from files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actors.text.chat_template import render, render_text
from actors.text.messages import ChatMessage
from actors.text.tokenizer import TextTokenizer
from actors.training.token_store import DataError, TokenSequence

_SHORTEST = 8
"""Tokens below which a piece of plain text is not worth a sequence."""


def read_prompts(path: Path) -> list[list[ChatMessage]]:
    """What to ask, a line each: `prompt` (one user turn), `turns` (the first one is asked) or `messages`.

    Raises DataError naming file and line.
    """
    prompts: list[list[ChatMessage]] = []
    for number, line in _objects(path):
        if isinstance(line.get("messages"), list):
            prompts.append(_messages(path, number, line["messages"]))
            continue
        turn = line.get("prompt") or next(iter(line.get("turns") or ()), None)
        if not isinstance(turn, str) or not turn:
            raise DataError(f"{path}:{number}: needs prompt, turns or messages")
        prompts.append([ChatMessage("user", turn)])
    if not prompts:
        raise DataError(f"{path} holds no prompt")
    return prompts


def read_texts(path: Path, tokenizer: TextTokenizer, max_len: int) -> Iterator[TokenSequence]:
    """Sequences of a file: plain text (`.txt`, or JSONL with `text`) is cut into pieces of `max_len` tokens,
    every token a label; of `messages` the last assistant turn is the answer, and only its tokens are labels.

    Raises DataError naming file and line.
    """
    if path.suffix not in (".jsonl", ".json"):
        try:
            yield from _pieces(path.read_text(encoding="utf-8"), tokenizer, max_len)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: {error}") from error
        return
    for number, line in _objects(path):
        if isinstance(line.get("text"), str):
            yield from _pieces(line["text"], tokenizer, max_len)
        elif isinstance(line.get("messages"), list):
            sequence = _chat(_messages(path, number, line["messages"]), tokenizer, max_len)
            if sequence is not None:
                yield sequence
        else:
            raise DataError(f"{path}:{number}: needs text or messages")


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        # Not splitlines: JSON strings may hold other line separators (U+2028, U+2029, U+0085).
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from error
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except ValueError as error:
            raise DataError(f"{path}:{number}: {error}") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}:{number}: not an object")
        yield number, value


def _messages(path: Path, number: int, values: list[Any]) -> list[ChatMessage]:
    try:
        return [ChatMessage(m["role"], m["content"]) for m in values]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}:{number}: each message needs role and content") from error


def _chat(messages: list[ChatMessage], tokenizer: TextTokenizer, max_len: int) -> TokenSequence | None:
    """None for a conversation without an answer, or whose prompt alone fills `max_len`."""
    last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=0)
    if last == 0:
        return None
    prompt = render(tokenizer, messages[:last])
    whole = render_text(tokenizer, messages[: last + 1], add_generation_prompt=False)
    ids = tokenizer.encode(whole, add_special_tokens=False)[:max_len]
    if len(ids) <= len(prompt) or ids[: len(prompt)] != prompt:
        return None
    return TokenSequence(tuple(ids), len(prompt))


def _pieces(text: str, tokenizer: TextTokenizer, max_len: int) -> Iterator[TokenSequence]:
    ids = tokenizer.encode(text)
    for start in range(0, len(ids), max_len):
        piece = ids[start : start + max_len]
        if len(piece) >= _SHORTEST:
            yield TokenSequence(tuple(piece), 1)
