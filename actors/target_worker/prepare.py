"""Check a request against the model and turn it into what the engine takes."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from actors.sampling.params import ParameterError, SamplingParams, SpeculationParams
from actors.target_worker.messages import GenerationRequest
from actors.target_worker.output import Prompt
from actors.text.chat_template import render_async
from actors.text.detokenizer import IncrementalDetokenizer
from actors.text.tokenizer import TextTokenizer

NESTED = "nested"
"""The drafter that has exit depths."""
MAX_WORD_CHARS = 256
"""Of one of `bad_words`: they are encoded, and compared with each other, while other requests wait."""


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a request is checked against. `vocab_size` is the number of logits; `exits` are the exit depths of
    the nested drafter, in layers."""

    max_model_len: int
    vocab_size: int
    drafters: Collection[str] = ()
    exits: Collection[int] = ()


async def prepare(
    request: GenerationRequest, tokenizer: TextTokenizer, limits: ModelLimits
) -> tuple[Prompt, SamplingParams]:
    """The prompt's ids and the sampling parameters in force.

    A max_tokens beyond what the context still holds is lowered to that (the choice then ends with finish
    reason "length"), and min_tokens with it. Raises ParameterError naming the field that cannot be served.
    """
    if request.n < 1:
        raise ParameterError("n", "must be at least 1")
    if request.first_choice < 0:
        raise ParameterError("first_choice", "must not be negative")
    if any(not stop for stop in request.stop):
        raise ParameterError("stop", "must not contain empty strings")
    if request.output_ids_so_far is not None and request.n != 1:
        raise ParameterError("n", "must be 1 when a request is resumed")
    sampling = request.sampling
    _check_ids(sampling.logit_bias, limits, "logit_bias")
    _check_ids(sampling.stop_token_ids, limits, "stop_token_ids")
    _check_ids(sampling.allowed_token_ids, limits, "allowed_token_ids")
    _check_ids(request.output_ids_so_far or (), limits, "output_ids_so_far")
    check_speculation(request.speculation, limits)
    prompt = await _prompt(request, tokenizer, limits)
    param = "prompt" if request.messages is None else "messages"
    if not prompt.ids:
        raise ParameterError(param, "must contain at least one token")
    room = limits.max_model_len - len(prompt.ids)
    if room <= 0:
        raise ParameterError(
            param,
            f"has {len(prompt.ids)} tokens, which leaves no room for an answer in this model's context of "
            f"{limits.max_model_len} tokens",
        )
    wanted = room if request.max_tokens is None else request.max_tokens
    if wanted < 0:
        raise ParameterError("max_tokens", "must not be negative")
    if request.max_tokens is not None and sampling.min_tokens > request.max_tokens:
        raise ParameterError("min_tokens", "must not exceed max_tokens")
    max_tokens = min(wanted, room)
    return prompt, replace(
        sampling,
        max_tokens=max_tokens,
        min_tokens=min(sampling.min_tokens, max_tokens),
        bad_sequences=bad_sequences(request.bad_words, tokenizer),
        eos_token_ids=tokenizer.eos_token_ids,
    )


def bad_sequences(words: Iterable[str], tokenizer: TextTokenizer) -> tuple[tuple[int, ...], ...]:
    """The token ids of each word, at the beginning of a text and after a space, without those whose end is
    bad by itself. (vLLM leaves out the second where it has more or fewer tokens than the first.)

    Raises ParameterError("bad_words").
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        if not word.strip():
            raise ParameterError("bad_words", "must not contain blank strings")
        if len(word) > MAX_WORD_CHARS:
            raise ParameterError(
                "bad_words", f"must not contain strings of more than {MAX_WORD_CHARS} characters"
            )
        for text in (word.lstrip(), " " + word.lstrip()):
            found[tuple(tokenizer.encode(text, add_special_tokens=False, param="bad_words"))] = None
    return tuple(ids for ids in found if not any(ids[k:] in found for k in range(1, len(ids))))


def check_speculation(speculation: SpeculationParams, limits: ModelLimits) -> None:
    """Raises ParameterError for a drafter or an exit depth that this model does not have."""
    drafter, depth = speculation.drafter, speculation.exit_depth
    if drafter is not None and drafter not in limits.drafters:
        known = ", ".join(sorted(limits.drafters)) or "none"
        raise ParameterError("speculation.drafter", f"unknown drafter {drafter!r}; this model has: {known}")
    if depth is None:
        return
    if drafter not in (None, NESTED):
        raise ParameterError("speculation.exit_depth", f"drafter {drafter!r} has no exits")
    if depth not in limits.exits:
        known = ", ".join(map(str, sorted(limits.exits))) or "none"
        raise ParameterError("speculation.exit_depth", f"unknown exit {depth}; this model has: {known}")


def _check_ids(ids: Iterable[int], limits: ModelLimits, param: str) -> None:
    for token_id in ids:
        if not 0 <= token_id < limits.vocab_size:
            raise ParameterError(
                param, f"token id {token_id} is not in this model's vocabulary of {limits.vocab_size}"
            )


async def _prompt(request: GenerationRequest, tokenizer: TextTokenizer, limits: ModelLimits) -> Prompt:
    if request.messages is not None:
        if request.echo:
            raise ParameterError("echo", "applies to a prompt, not to messages")
        return Prompt(tuple(await render_async(tokenizer, request.messages)), is_chat=True)
    if request.prompt_text is not None:
        ids, offsets = await tokenizer.encode_async(request.prompt_text)
        return Prompt(tuple(ids), request.prompt_text, tuple(offsets), request.echo)
    prompt_ids = request.prompt_ids or ()
    _check_ids(prompt_ids, limits, "prompt")
    if not request.echo:
        return Prompt(prompt_ids)
    detokenizer = IncrementalDetokenizer(tokenizer)
    text: list[str] = []
    starts: list[int] = []
    for token_id in prompt_ids:
        starts.append(detokenizer.chars)
        text.append(detokenizer.feed((token_id,)))
    return Prompt(prompt_ids, "".join(text), tuple(starts), echo=True)
