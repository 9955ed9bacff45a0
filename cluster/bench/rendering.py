"""Questions to prompts: rendered and tokenized once, so that every engine computes on the same ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.text.chat_template import render_text
from actors.text.messages import ChatMessage
from actors.text.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    ids: tuple[int, ...]
    text: str


class PromptRenderer:
    """Renders conversations with the chat template in a model's folder."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = TextTokenizer(folder)
        self._known: dict[tuple[tuple[str, ...], tuple[str, ...]], RenderedPrompt] = {}

    def render(self, turns: Sequence[str], answers: Sequence[str] = ()) -> RenderedPrompt:
        """The prompt for the answer to user turn `len(answers)`: the turns up to it, with the answers given
        so far between them. Raises ParameterError when the model's template refuses the conversation."""
        key = (tuple(turns[: len(answers) + 1]), tuple(answers))
        if key not in self._known:
            messages = [ChatMessage("user", key[0][0])]
            for answer, turn in zip(answers, key[0][1:], strict=True):
                messages += [ChatMessage("assistant", answer), ChatMessage("user", turn)]
            text = render_text(self._tokenizer, messages)
            # The template writes the special tokens itself.
            self._known[key] = RenderedPrompt(
                tuple(self._tokenizer.encode(text, add_special_tokens=False)), text
            )
        return self._known[key]
