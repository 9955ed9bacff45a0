"""What one choice delivers: engine outputs to text, log-probabilities, usage and finish reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from actors.engine.messages import FinishReason, RequestOutput
from actors.sampling.params import SamplingParams
from actors.sampling.results import TokenLogprobs
from actors.target_worker.messages import (
    GenerationChunk,
    PositionLogprobs,
    RequestError,
    SpeculationStats,
    TextLogprob,
    Usage,
)
from actors.text.detokenizer import IncrementalDetokenizer
from actors.text.stop_strings import StopStringMatcher
from actors.text.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt ready for the engine.

    offsets: characters of `text` before each id. echo: whether the choice's text begins with `text`.
    is_chat: the answer starts a text of its own instead of continuing the prompt's.
    """

    ids: tuple[int, ...]
    text: str = ""
    offsets: tuple[int, ...] = ()
    echo: bool = False
    is_chat: bool = False


class ChoiceStream:
    """Turns the outputs of one choice into chunks.

    Tokens are taken one by one, so that a choice ends exactly where plain decoding would end it, also in the
    middle of an accepted block: nothing after an end id or a completed stop string is delivered, in text,
    ids, log-probabilities, rounds and usage. Accepted drafts count as far as they were delivered. A stop id
    is delivered as a token; like a stop string, it adds text with `include_stop` only.

    `output_ids_so_far` of the request are replayed silently: they count in usage and limits, and what they
    leave undecided (an incomplete character, the beginning of a stop string) is continued.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        index: int,
        prompt: Prompt,
        sampling: SamplingParams,
        stop: Sequence[str] = (),
        output_ids_so_far: Sequence[int] | None = None,
        include_stop: bool = False,
    ) -> None:
        self._include_stop = include_stop
        self._tokenizer = tokenizer
        self._index = index
        self._prompt = prompt
        self._sampling = sampling
        self._stop_ids = sampling.stop_ids
        self._detokenizer = IncrementalDetokenizer(tokenizer, () if prompt.is_chat else prompt.ids)
        self._matcher = StopStringMatcher(stop)
        self._count = 0
        self._cached_tokens = 0
        self._finish: FinishReason | None = None
        self._stop_reason: str | int | None = None
        self._accepted_counts: list[int] = []
        self._drafted = 0
        self._by_drafter: dict[str, tuple[int, int]] = {}
        self._opened = False
        self._resumed = output_ids_so_far is not None
        for token_id in output_ids_so_far or ():
            if self._finish is None:
                self._advance(token_id)

    @property
    def finished(self) -> bool:
        return self._finish is not None

    def push(self, output: RequestOutput) -> GenerationChunk:
        """What `output` adds. The chunk that finishes the choice carries usage and statistics."""
        self._cached_tokens = max(self._cached_tokens, output.cached_tokens)
        opening = self._open(output)
        text: list[str] = [opening.text]
        positions: list[PositionLogprobs] = []
        taken = 0
        for token_id in output.token_ids:
            if self._finish is not None:
                break
            if output.logprobs is not None:
                offset = self._text_start + self._detokenizer.chars
                positions.append(self._position(output.logprobs[taken], offset))
            text.append(self._advance(token_id))
            taken += 1
        if self._finish is None and output.finish_reason is not None:
            self._end(output.finish_reason, output.stop_token_id)
        if self._finish is not None:  # after a match nothing is held
            text.append(self._matcher.flush())
        return replace(
            opening,
            text="".join(text),
            token_ids=output.token_ids[:taken],
            rounds=self._round(output, taken),
            logprobs=tuple(positions) if output.logprobs is not None and taken else None,
            finish_reason=self._finish,
            stop_reason=self._stop_reason,
            usage=self._usage() if self._finish else None,
            speculation=self._speculation() if self._finish else None,
            error=_error(output),
        )

    def _advance(self, token_id: int) -> str:
        """Take one token and return the text that may be shown; sets the finish reason."""
        self._count += 1
        if token_id in self._stop_ids:
            self._end("stop", token_id)
            # What a stop string may have begun in is held back, and comes before it.
            return self._matcher.flush() + self._detokenizer.feed((token_id,)) if self._include_stop else ""
        delta = self._detokenizer.feed((token_id,))
        text, stop = self._matcher.feed(delta, active=self._count >= self._sampling.min_tokens)
        if stop is not None:
            self._finish, self._stop_reason = "stop", stop
            text += stop if self._include_stop else ""
        elif self._count >= self._sampling.max_tokens:
            self._finish = "length"
        return text

    def _end(self, reason: FinishReason, stop_token_id: int | None) -> None:
        self._finish = reason
        if reason == "stop" and stop_token_id in self._sampling.stop_token_ids:
            self._stop_reason = stop_token_id

    def _open(self, output: RequestOutput) -> GenerationChunk:
        """The frame of a chunk; the choice's first has the seed and the prompt's part."""
        if self._opened:
            return GenerationChunk(index=self._index)
        self._opened = True
        if self._resumed:  # the prompt was delivered before
            return GenerationChunk(index=self._index, seed=self._sampling.seed)
        prompt = self._prompt
        return GenerationChunk(
            index=self._index,
            text=prompt.text if prompt.echo else "",
            seed=self._sampling.seed,
            prompt_token_ids=prompt.ids if prompt.echo else None,
            prompt_logprobs=self._prompt_logprobs(output),
            prompt_usage=replace(self._usage(), completion_tokens=0),
            queue_s=output.queue_s,
        )

    @property
    def _text_start(self) -> int:
        return len(self._prompt.text) if self._prompt.echo else 0

    def _prompt_logprobs(self, output: RequestOutput) -> tuple[PositionLogprobs | None, ...] | None:
        if output.prompt_logprobs is None:
            return None
        offsets = self._prompt.offsets or (0,) * len(output.prompt_logprobs)
        return tuple(
            None if entry is None else self._position(entry, offset)
            for entry, offset in zip(output.prompt_logprobs, offsets, strict=True)
        )

    def _position(self, entry: TokenLogprobs, offset: int) -> PositionLogprobs:
        return PositionLogprobs(
            chosen=self._with_text(entry.token_id, entry.logprob),
            top=tuple(self._with_text(token_id, logprob) for token_id, logprob in entry.top),
            text_offset=offset,
        )

    def _with_text(self, token_id: int, logprob: float) -> TextLogprob:
        tokenizer = self._tokenizer
        return TextLogprob(token_id, logprob, tokenizer.token_text(token_id), tokenizer.token_bytes(token_id))

    def _round(self, output: RequestOutput, taken: int) -> tuple[tuple[int, int], ...]:
        if not taken:
            return ()
        report = output.round
        accepted = min(report.accepted, taken) if report is not None else 0
        if report is not None and report.drafted:
            self._drafted += report.drafted
            missing = 1 + report.drafted - len(self._accepted_counts)
            self._accepted_counts.extend([0] * missing)
            self._accepted_counts[accepted] += 1
            if report.drafter is not None:
                depth = "" if report.exit_depth is None else f"@{report.exit_depth}"
                name = report.drafter + depth
                before = self._by_drafter.get(name, (0, 0))
                self._by_drafter[name] = (before[0] + report.drafted, before[1] + accepted)
        return ((taken, accepted),)

    def _usage(self) -> Usage:
        first = self._index == 0
        return Usage(
            prompt_tokens=len(self._prompt.ids) if first else 0,
            completion_tokens=self._count,
            cached_tokens=self._cached_tokens if first else 0,
        )

    def _speculation(self) -> SpeculationStats:
        histogram = tuple(self._accepted_counts)
        return SpeculationStats(
            num_spec_steps=sum(histogram),
            num_draft_tokens=self._drafted,
            num_accepted_draft_tokens=sum(k * steps for k, steps in enumerate(histogram)),
            acceptance_histogram=histogram,
            by_drafter=tuple((name, *counts) for name, counts in self._by_drafter.items()),
        )


def _error(output: RequestOutput) -> RequestError | None:
    if output.finish_reason == "error":
        return RequestError("internal", output.error or "the engine failed")
    if output.finish_reason == "abort":
        return RequestError("unavailable", output.error or "the request was aborted")
    return None


def merge(earlier: GenerationChunk | None, later: GenerationChunk) -> GenerationChunk:
    """One chunk that says what two successive chunks of a choice say."""
    if earlier is None:
        return later
    logprobs = (earlier.logprobs or ()) + (later.logprobs or ())
    return replace(
        later,
        text=earlier.text + later.text,
        token_ids=earlier.token_ids + later.token_ids,
        rounds=earlier.rounds + later.rounds,
        logprobs=logprobs or None,
        seed=earlier.seed if later.seed is None else later.seed,
        prompt_token_ids=earlier.prompt_token_ids or later.prompt_token_ids,
        prompt_logprobs=earlier.prompt_logprobs or later.prompt_logprobs,
        prompt_usage=earlier.prompt_usage or later.prompt_usage,
        queue_s=earlier.queue_s if later.queue_s is None else later.queue_s,
    )
