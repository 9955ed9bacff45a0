"""Conversations that a target has with itself: user turns sampled from the template up to the user's turn
(Magpie, arXiv 2406.08464), then answers, greedy and sampled, in large batches on our own engine.

The teacher's top log-probabilities are those that the engine reports beside each token, so that the teacher
is not run again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from actors.engine.interface import TargetEngine
from actors.engine.messages import EngineRequest, FinishReason
from actors.sampling.params import SamplingParams, SpeculationParams
from actors.sampling.results import TokenLogprobs
from actors.text.chat_template import render, render_text
from actors.text.messages import ChatMessage
from actors.text.tokenizer import TextTokenizer
from actors.training.settings import DataSettings
from actors.training.token_store import TeacherRows, TokenSequence

_MARK = "\u2042S2D\u2042"
"""Stands for the user's text while looking for what the template puts around it."""
_PLAIN = SpeculationParams(enabled=False)


@dataclass(frozen=True, slots=True)
class UserTurn:
    """What a chat template puts before a user's first turn, as ids, the ids that end the turn, and what it
    puts from the turn's end to where the answer begins."""

    before: tuple[int, ...]
    ends: tuple[int, ...]
    header: tuple[int, ...]


@dataclass(slots=True)
class Generated:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """One sequence, and the teacher's rows for its labels (None when they were not asked for)."""

    sequence: TokenSequence
    teacher: TeacherRows | None


def user_turn(tokenizer: TextTokenizer) -> UserTurn:
    """Raises ValueError when the template does not write the user's text as it is."""
    turn = [ChatMessage("user", _MARK)]
    before, found, after = render_text(tokenizer, turn, add_generation_prompt=False).partition(_MARK)
    if not found or not before:
        raise ValueError("the chat template changes the user's text: give prompts instead")
    ends = set(tokenizer.eos_token_ids)
    following = tokenizer.encode(after, add_special_tokens=False)
    if following:
        ends.add(following[0])
    header = tokenizer.encode(render_text(tokenizer, turn).partition(_MARK)[2], add_special_tokens=False)
    before_ids = tokenizer.encode(before, add_special_tokens=False)
    return UserTurn(tuple(before_ids), tuple(sorted(ends)), tuple(header))


def run_requests(
    engine: TargetEngine, requests: Sequence[EngineRequest], on_tokens: Callable[[int], None]
) -> dict[str, Generated]:
    """Run requests together to their end; `on_tokens` gets the number of tokens of every step."""
    results = {request.request_id: Generated() for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work():
        emitted = 0
        for output in engine.step():
            result = results[output.request_id]
            result.token_ids.extend(output.token_ids)
            result.logprobs.extend(output.logprobs or ())
            result.finish = output.finish_reason or result.finish
            emitted += len(output.token_ids)
        on_tokens(emitted)
    return results


class ConversationMaker:
    """Makes numbered conversations. Number i is the same whatever was made before (up to the numerics of the
    engine's batches), so that a shard can be made alone."""

    def __init__(
        self,
        engine: TargetEngine,
        tokenizer: TextTokenizer,
        settings: DataSettings,
        on_tokens: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._engine, self._tokenizer, self._settings = engine, tokenizer, settings
        self._on_tokens = on_tokens

    def make(
        self, numbers: Sequence[int], prompts: Sequence[Sequence[ChatMessage]] | None = None
    ) -> list[Conversation]:
        """Conversations of these numbers; those without a usable user turn or answer are left out.
        `prompts`, one a number, take the place of sampled user turns."""
        if prompts is None:
            turns = self.sample_turns(numbers)
            pairs = [(n, [ChatMessage("user", t)]) for n, t in zip(numbers, turns, strict=True) if t]
        else:
            pairs = [(n, list(p)) for n, p in zip(numbers, prompts, strict=True)]
        return list(self._answer(pairs))

    def sample_turns(self, numbers: Sequence[int]) -> list[str]:
        """User turns as text, empty for one that did not end in time."""
        settings, turn = self._settings, user_turn(self._tokenizer)
        requests = [
            EngineRequest(
                f"turn-{n}",
                turn.before,
                SamplingParams(
                    max_tokens=settings.prompt_tokens,
                    temperature=settings.prompt_temperature,
                    top_p=settings.top_p,
                    seed=_seed(settings.seed, n, 0),
                    stop_token_ids=turn.ends,
                ),
                _PLAIN,
            )
            for n in numbers
        ]
        results = run_requests(self._engine, requests, self._on_tokens)
        texts = []
        for n in numbers:
            result = results[f"turn-{n}"]
            ended = result.finish == "stop"
            text = self._tokenizer.decode(result.token_ids, skip_special_tokens=True) if ended else ""
            texts.append("" if "\ufffd" in text else text.strip())
        return texts

    def _answer(self, pairs: Sequence[tuple[int, list[ChatMessage]]]) -> Iterator[Conversation]:
        settings = self._settings
        requests: list[EngineRequest] = []
        for n, messages in pairs:
            prompt = tuple(render(self._tokenizer, messages))
            room = settings.max_len - len(prompt)
            if room < 2:
                continue
            greedy = random.Random(_seed(settings.seed, n, 1)).random() < settings.greedy_share
            sampling = SamplingParams(
                max_tokens=room,
                temperature=0.0 if greedy else settings.answer_temperature,
                top_p=1.0 if greedy else settings.top_p,
                seed=_seed(settings.seed, n, 2),
                eos_token_ids=self._tokenizer.eos_token_ids,
                logprobs=settings.teacher_top or None,
            )
            requests.append(EngineRequest(f"answer-{n}", prompt, sampling, _PLAIN))
        results = run_requests(self._engine, requests, self._on_tokens)
        for request in requests:
            result = results[request.request_id]
            if result.finish not in ("stop", "length") or not result.token_ids:
                continue
            ids = (*request.prompt_ids, *result.token_ids)
            sequence = TokenSequence(ids, len(request.prompt_ids), request.sampling.greedy)
            teacher = teacher_rows(result.logprobs, settings.teacher_top) if settings.teacher_top else None
            yield Conversation(sequence, teacher)


def teacher_rows(logprobs: Sequence[TokenLogprobs], top: int) -> TeacherRows:
    """The engine's report as arrays [labels, top]."""
    ids = np.array([[token for token, _ in row.top[:top]] for row in logprobs], dtype=np.int64)
    values = np.array([[value for _, value in row.top[:top]] for row in logprobs], dtype=np.float32)
    return TeacherRows(ids, values)


def _seed(seed: int, number: int, purpose: int) -> int:
    """A seed of its own for every request."""
    return (seed * 4 + purpose) * (1 << 32) + number
