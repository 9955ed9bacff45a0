"""Messages to a prompt, with the model's own chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from actors.sampling.params import ParameterError
from actors.text.messages import ChatMessage
from actors.text.tokenizer import INLINE_CHARS, TextTokenizer

PARAM = "messages"


def render_text(
    tokenizer: TextTokenizer, messages: Sequence[ChatMessage], add_generation_prompt: bool = True
) -> str:
    """The conversation as text, ending where the assistant's answer begins unless told otherwise.

    Raises ParameterError("messages") when there are none, the model has no template, or the template refuses
    them (an unknown role, a wrong order).
    """
    if not messages:
        raise ParameterError(PARAM, "must not be empty")
    if not tokenizer.hf.chat_template:
        raise ParameterError(PARAM, "this model has no chat template; use completions with a prompt")
    conversation = [{"role": m.role, "content": m.content} for m in messages]
    try:
        text = tokenizer.hf.apply_chat_template(
            conversation, add_generation_prompt=add_generation_prompt, tokenize=False
        )
    except Exception as error:  # a template is foreign code run on the messages: what fails is about them
        raise ParameterError(PARAM, f"the model's chat template refuses them: {error}") from error
    return str(text)


def render(
    tokenizer: TextTokenizer, messages: Sequence[ChatMessage], add_generation_prompt: bool = True
) -> list[int]:
    """Token ids of the rendered prompt. The template writes special tokens itself, so none are added."""
    text = render_text(tokenizer, messages, add_generation_prompt)
    return tokenizer.encode(text, add_special_tokens=False, param=PARAM)


async def render_async(
    tokenizer: TextTokenizer, messages: Sequence[ChatMessage], add_generation_prompt: bool = True
) -> list[int]:
    """`render`, in a thread when the messages are long."""
    if sum(len(m.content) for m in messages) <= INLINE_CHARS:
        return render(tokenizer, messages, add_generation_prompt)
    return await asyncio.to_thread(render, tokenizer, messages, add_generation_prompt)
