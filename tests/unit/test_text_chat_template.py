"""Messages to prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.sampling.params import ParameterError
from actors.text.chat_template import render, render_async, render_text
from actors.text.messages import ChatMessage
from actors.text.tokenizer import INLINE_CHARS, TextTokenizer
from tests.toy_tokenizers import BOS, byte_level_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(byte_level_folder(tmp_path_factory.mktemp("chat")))


def test_template_ends_where_the_answer_begins(tokenizer: TextTokenizer) -> None:
    messages = [ChatMessage("system", "be brief"), ChatMessage("user", "the end?")]
    text = render_text(tokenizer, messages)
    assert text == "<s>system: be brief\n<s>user: the end?\n<s>assistant: "
    ids = render(tokenizer, messages)
    assert ids.count(BOS) == 3  # the template's own, none added
    assert tokenizer.decode(ids) == text
    assert render_text(tokenizer, messages, add_generation_prompt=False) == text.removesuffix(
        "<s>assistant: "
    )


async def test_long_messages_render_the_same(tokenizer: TextTokenizer) -> None:
    messages = [ChatMessage("user", "ok " * INLINE_CHARS)]
    assert await render_async(tokenizer, messages) == render(tokenizer, messages)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "empty"),
        ([ChatMessage("wizard", "hi")], "unknown role wizard"),
        ([ChatMessage("user", "\ud800")], "Unicode"),
    ],
)
def test_bad_messages_are_named(tokenizer: TextTokenizer, messages: list[ChatMessage], says: str) -> None:
    with pytest.raises(ParameterError, match=says) as caught:
        render(tokenizer, messages)
    assert caught.value.param == "messages"


def test_a_model_without_template_says_so(tmp_path: Path) -> None:
    base = TextTokenizer(byte_level_folder(tmp_path, template=None))
    with pytest.raises(ParameterError, match="no chat template") as caught:
        render(base, [ChatMessage("user", "hi")])
    assert caught.value.param == "messages"
