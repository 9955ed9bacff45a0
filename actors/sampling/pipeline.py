"""From raw logits to processed scores, for one sequence at a time.

Order (a contract, see `SamplingParams`): masks, logit_bias, min_tokens, repetition, presence and frequency
penalties, division by temperature, min_p, top_k, top_p. What does not survive is -inf.

The bits of a processed row depend on that row, the request and the tokens before it, and on nothing else:
every row is processed by operations on [V] tensors of its own, never as part of a [K + 1, V] batch, because
vectorised kernels treat the ends of their chunks differently and chunks move with the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from actors.sampling.grammar import GrammarError, GrammarMatcher
from actors.sampling.noise import derive_key
from actors.sampling.params import DraftSampling, ParameterError, SamplingParams
from actors.sampling.truncation import keep_at_least, survival_threshold


class SampledRequest(Protocol):
    """What sampling reads of a request (`actors.engine.messages.EngineRequest`)."""

    @property
    def prompt_ids(self) -> Sequence[int]: ...
    @property
    def output_ids_so_far(self) -> Sequence[int]: ...
    @property
    def sampling(self) -> SamplingParams: ...
    @property
    def choice(self) -> int: ...


def check_vocabulary(sampling: SamplingParams, vocab_size: int) -> None:
    """Raise `ParameterError` for token ids that the model does not have.

    The model's own end ids are exempt: some configurations name ids beyond the vocabulary.
    """
    checked: dict[str, Iterable[int]] = {
        "logit_bias": sampling.logit_bias,
        "stop_token_ids": sampling.stop_token_ids,
        "allowed_token_ids": sampling.allowed_token_ids,
        "bad_words": chain.from_iterable(sampling.bad_sequences),
    }
    for name, ids in checked.items():
        for token in ids:
            if not 0 <= token < vocab_size:
                raise ParameterError(name, f"token id {token} is outside the vocabulary ({vocab_size})")


class _Penalties:
    """Repetition (Hugging Face's rule, over prompt and output), presence and frequency (OpenAI's, over
    output)."""

    def __init__(self, request: SampledRequest, vocab_size: int, device: torch.device) -> None:
        self._sampling = request.sampling
        self.counts = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        self.in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        prompt = torch.tensor(request.prompt_ids, dtype=torch.int64, device=device)
        self.in_prompt[prompt] = True

    def apply(self, row: Tensor, counts: Tensor) -> None:
        """Penalise `row` (float32 [V]) in place, given how often each token was emitted (float32 [V])."""
        sampling = self._sampling
        emitted = counts > 0
        if sampling.repetition_penalty != 1.0:
            factor = sampling.repetition_penalty
            punished = torch.where(row > 0, row / factor, row * factor)
            torch.where(emitted | self.in_prompt, punished, row, out=row)
        if sampling.presence_penalty != 0.0:
            row -= emitted.to(torch.float32).mul_(sampling.presence_penalty)
        if sampling.frequency_penalty != 0.0:
            row -= counts * sampling.frequency_penalty


class _Masks:
    """Which tokens may be emitted at all: those of the grammar, of `allowed_token_ids`, and those that
    complete no bad sequence. Each narrows what the ones before it left, unless it would leave nothing: so the
    grammar wins over `allowed_token_ids`, and both over bad sequences."""

    def __init__(self, sampling: SamplingParams, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._allowed: Tensor | None = None
        if sampling.allowed_token_ids:
            self._allowed = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._allowed[list(sampling.allowed_token_ids)] = True
        self._bad = sampling.bad_sequences
        self.memory = max(map(len, self._bad), default=1) - 1
        """How many of the last tokens matter."""

    def narrowed(self, mask: Tensor | None, before: Sequence[int]) -> Tensor | None:
        """Those of `mask` that may follow the output tokens `before` (the last `memory` of them, or more):
        bool [V]; None stands for all."""
        if self._allowed is not None:
            mask = self._unless_empty(mask, self._allowed)
        bad = [s[-1] for s in self._bad if len(s) == 1 or tuple(before[1 - len(s) :]) == s[:-1]]
        if bad:
            good = torch.ones(self._vocab_size, dtype=torch.bool, device=self._device)
            good[bad] = False
            mask = self._unless_empty(mask, good)
        return mask

    @staticmethod
    def _unless_empty(mask: Tensor | None, narrower: Tensor) -> Tensor | None:
        both = narrower if mask is None else mask & narrower
        return both if bool(both.any()) else mask


class SequenceSampler:
    """The sampling state of one running request: what it emitted, its penalty counts and its grammar.

    Args:
        request: its `output_ids_so_far` are taken as emitted.
        vocab_size: V, the width of the model's logits.
        grammar: a fresh matcher for `request.sampling.grammar`, owned by the sampler; None without one.
        device: where the logits live.

    Raises:
        ParameterError: a token id of a parameter is not in the vocabulary, or the tokens emitted so far break
            the grammar.
    """

    def __init__(
        self,
        request: SampledRequest,
        vocab_size: int,
        grammar: GrammarMatcher | None,
        device: torch.device | None = None,
    ) -> None:
        sampling = request.sampling
        if (grammar is None) != (sampling.grammar is None):
            raise ValueError("a grammar matcher is needed exactly when the request has a grammar")
        check_vocabulary(sampling, vocab_size)
        self._sampling = sampling
        self._vocab_size = vocab_size
        self._device = torch.device("cpu") if device is None else device
        self._grammar = grammar
        self._output: list[int] = []
        self._key = derive_key(sampling.seed, request.choice)
        self._stop_ids = sampling.stop_ids
        self._maskable_stops = sorted(t for t in self._stop_ids if 0 <= t < vocab_size)
        self._stop_index = self._index(self._maskable_stops)
        self._bias_index = self._index(sampling.logit_bias)
        self._bias = torch.tensor(
            list(sampling.logit_bias.values()), dtype=torch.float32, device=self._device
        )
        self._masks = _Masks(sampling, vocab_size, self._device)
        self._penalties = _Penalties(request, vocab_size, self._device) if sampling.has_penalties else None
        try:
            self.commit(request.output_ids_so_far)
        except GrammarError as error:
            raise ParameterError("output_ids_so_far", str(error)) from error

    def _index(self, ids: Iterable[int]) -> Tensor:
        return torch.tensor(list(ids), dtype=torch.int64, device=self._device)

    @property
    def key(self) -> int:
        """The uint64 noise key of the request."""
        return self._key

    @property
    def greedy(self) -> bool:
        return self._sampling.greedy

    @property
    def remembers(self) -> bool:
        """Whether scores depend on which tokens were emitted, not only on how many."""
        return self._penalties is not None or self._grammar is not None or self._masks.memory > 0

    @property
    def output_ids(self) -> Sequence[int]:
        """All tokens emitted, earlier replicas' included."""
        return self._output

    def draft_sampling(self, rule: str) -> DraftSampling:
        """What a drafter is told. `rule` is the verification rule that judges this request."""
        sampling = self._sampling
        return DraftSampling(
            key=self._key,
            temperature=0.0 if sampling.greedy else sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            rule=rule,
        )

    def admissible(self, drafts: Sequence[int], *, tree: bool = False, drawn: bool = False) -> int:
        """How many of the drafts may be verified: up to the first that the grammar forbids (or that is no
        token at all), and none after a stop id. Of a `tree` (no grammar), up to the first that
        is no token; the target stops at a stop id by itself. Of drafts that were `drawn` from a q, also the
        first that the grammar forbids: what is emitted in its place depends on its rejection. Changes no
        state."""
        count = 0
        for token in drafts:
            if not 0 <= token < self._vocab_size:
                break
            count += 1
            if token in self._stop_ids and not tree:
                break
        if self._grammar is not None and count:
            count = min(count, self._grammar.admissible(drafts[:count]) + drawn)
        return count

    def tree_scores(self, logits: Tensor, depths: Sequence[int]) -> Tensor:
        """Processed scores of a tree's rows, for a sampler that does not remember: float32 [K + 1, V], a new
        tensor. logits: the same, raw; row 0 follows the last emitted token, row j + 1 draft j, which is token
        number `depths[j]` after it."""
        if self.remembers:
            raise ValueError("penalties, grammars and bad words need to know the tokens before a row")
        out = logits.to(torch.float32, copy=True).contiguous()
        for row, depth in zip(out, (0, *depths), strict=True):
            self._process(row, len(self._output) + depth, (), None)
        return out

    def scores(self, logits: Tensor, drafts: Sequence[int], *, drawn: bool = False) -> Tensor:
        """Processed scores of a block.

        Args:
            logits: float32 [K + 1, V], raw; not modified. Row j follows `drafts[:j]`.
            drafts: K ids, all of them admissible.
            drawn: from a q, so that the last may be one that the grammar forbids. No rule accepts it; the
                row after it stays raw.

        Returns:
            float32 [K + 1, V], a new tensor; non-survivors are -inf. At least one token survives in each row.

        Raises:
            ValueError: shapes disagree.
            GrammarError: a draft is not admissible, or the grammar ran into a limit.
        """
        if logits.shape != (len(drafts) + 1, self._vocab_size):
            wanted = (len(drafts) + 1, self._vocab_size)
            raise ValueError(f"logits must be {wanted}, not {tuple(logits.shape)}")
        out = logits.to(torch.float32, copy=True).contiguous()
        counts = None if self._penalties is None else self._penalties.counts.clone()
        advanced = 0
        try:
            for j in range(len(drafts) + 1):
                self._process(out[j], len(self._output) + j, drafts[:j], counts)
                if j == len(drafts):
                    break
                if counts is not None:
                    counts[drafts[j]] += 1
                if self._grammar is not None:
                    if drawn and j + 1 == len(drafts) and not self._grammar.admissible(drafts[j:]):
                        break
                    self._grammar.advance(drafts[j])
                    advanced += 1
        finally:
            if self._grammar is not None:
                self._grammar.rollback(advanced)
        return out

    def _process(self, row: Tensor, emitted: int, drafts: Sequence[int], counts: Tensor | None) -> None:
        """`row` (float32 [V]) in place. It is for token number `emitted`, which follows `drafts`; those, and
        `counts`, are read only where the sampler remembers."""
        sampling = self._sampling
        allowed = None if self._grammar is None else self._grammar.mask().to(self._device)
        memory = self._masks.memory
        allowed = self._masks.narrowed(allowed, [*self._output[-memory:], *drafts] if memory else ())
        if allowed is not None:
            row.masked_fill_(~allowed, -math.inf)
        if self._bias.numel():
            row[self._bias_index] += self._bias
        if emitted < sampling.min_tokens and self._min_tokens_leave_something(allowed):
            row[self._stop_index] = -math.inf
        if self._penalties is not None and counts is not None:
            self._penalties.apply(row, counts)
        if sampling.greedy:
            # Neither a positive factor nor cutting the tail changes which token is best.
            return
        if sampling.temperature != 1.0:
            row /= sampling.temperature
        if sampling.top_k or sampling.top_p < 1.0 or sampling.min_p > 0.0:
            threshold = survival_threshold(
                row, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p
            )
            keep_at_least(row, threshold)

    def _min_tokens_leave_something(self, allowed: Tensor | None) -> bool:
        """Whether a token is left when stop ids are masked. A grammar that is complete allows nothing else;
        it wins over min_tokens, since text after the end of a JSON object would break it."""
        if not self._maskable_stops:
            return False
        if allowed is None:
            return len(self._maskable_stops) < self._vocab_size
        rest = int(allowed.sum()) - int(allowed[self._stop_index].sum())
        return rest > 0

    def commit(self, token_ids: Sequence[int]) -> None:
        """Append emitted tokens.

        Raises:
            GrammarError: the grammar does not allow them.
        """
        for token in token_ids:
            if self._grammar is not None:
                self._grammar.advance(token)
            if self._penalties is not None:
                self._penalties.counts[token] += 1
            self._output.append(token)
