"""Constraints on the output text, through llguidance (https://github.com/guidance-ai/llguidance).

A matcher walks the grammar token by token and says which tokens may come next. End-of-sequence ids are
handled here rather than in the library, which does not count an end token that follows a text that cannot go
on, so that `rollback` is exact whatever was advanced over.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import llguidance
import numpy as np
import torch
from torch import Tensor

from actors.sampling.params import GrammarSpec, ParameterError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PARAM = "response_format"
_CACHE_SIZE = 64
_JSON_OPTIONS = {
    # A small model asked for JSON can go on writing blanks for ever. Between two JSON tokens this allows one
    # space, or one line break with indentation.
    "lenient": False,
    "whitespace_flexible": True,
    "whitespace_pattern": r" |\r?\n[ \t]{0,32}",
}
_MAX_MESSAGE = 300
_JSON_ROW_ITEMS = 2000
_GRAMMAR_ROW_ITEMS = 400
"""Earley items of one position at most. A schema with 200 optional properties needs 800; a Lark grammar with
2000 is so ambiguous that one mask takes half a second, during which everybody waits."""


class GrammarError(RuntimeError):
    """A token was forced on a grammar that forbids it, or the grammar became too complex to go on."""


class GrammarMatcher:
    """The state of one output in its grammar. Made by `GrammarCompiler.compile`; used by one thread."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos = frozenset(eos_token_ids)
        self._eos_seen = 0

    @property
    def finished(self) -> bool:
        """Whether nothing but an end-of-sequence id may follow."""
        return self._eos_seen > 0 or bool(self._matcher.is_stopped())

    def _may_end(self) -> bool:
        return self.finished or bool(self._matcher.is_accepting())

    def admissible(self, drafts: Sequence[int]) -> int:
        """Length of the longest prefix of `drafts` that the grammar allows. Changes no state."""
        if self.finished:
            return _leading(drafts, self._eos)
        text = list(drafts[: _first(drafts, self._eos)])
        count = self._valid(text)
        if count < len(text) or count == len(drafts):
            return count
        for token in text:
            self.advance(token)
        may_end = self._may_end()
        self.rollback(count)
        return count + _leading(drafts[count:], self._eos) if may_end else count

    def mask(self) -> Tensor:
        """bool [V] on the CPU: which tokens may come next, at least one. Ids past the tokenizer's are never.

        Raises:
            GrammarError: the grammar ran into a limit of the library.
        """
        if self.finished:
            self._check()
            allowed = np.zeros(self._vocab_size, dtype=np.bool_)
            allowed[list(self._eos)] = True
            return torch.from_numpy(allowed)
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        bits = np.unpackbits(packed, bitorder="little", count=self._vocab_size)
        return torch.from_numpy(bits.view(np.bool_))

    def advance(self, token: int) -> None:
        """Append one token. Raises `GrammarError` when it is not allowed; the state is then unchanged."""
        if token in self._eos and self._may_end():
            self._eos_seen += 1
            return
        if self.finished or self._valid([token]) != 1:
            raise GrammarError(f"token {token} does not satisfy the grammar")
        self._matcher.consume_token(token)
        self._check()

    def rollback(self, count: int) -> None:
        """Take back the last `count` tokens."""
        ends = min(count, self._eos_seen)
        self._eos_seen -= ends
        if count > ends and not self._matcher.rollback(count - ends):
            self._check()
            raise GrammarError(f"cannot take back {count} tokens")

    def _valid(self, tokens: Sequence[int]) -> int:
        # Asked about an id that does not exist, the library gives up for good.
        known = next((j for j, token in enumerate(tokens) if not 0 <= token < self._vocab_size), len(tokens))
        if known == 0:
            return 0
        count = int(self._matcher.validate_tokens(list(tokens[:known])))
        self._check()
        return count

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(_brief(self._matcher.get_error()))


class GrammarCompiler:
    """Compiles grammars for one tokenizer and keeps the most recent ones. Safe to call from several threads.

    Args:
        hf_tokenizer: a fast tokenizer (the Rust kind) of transformers.
        vocab_size: V, the width of the model's logits; may exceed the tokenizer's.
        eos_token_id: the model's end id, or several.

    Reading the vocabulary takes seconds for large ones and happens with the first grammar.
    """

    def __init__(
        self,
        hf_tokenizer: PreTrainedTokenizerFast,
        vocab_size: int,
        eos_token_id: int | Sequence[int],
        cache_size: int = _CACHE_SIZE,
    ) -> None:
        eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        self._eos = [token for token in eos if 0 <= token < vocab_size]
        self._hf_tokenizer = hf_tokenizer
        self._vocab_size = vocab_size
        self._cache_size = cache_size
        self._cache: OrderedDict[GrammarSpec, Future[llguidance.LLMatcher]] = OrderedDict()
        self._lock = threading.Lock()
        """Of the cache only. The engine thread takes it too, and must not wait for builds of others."""
        self._tokenizer_lock = threading.Lock()
        self._tokenizer: llguidance.LLTokenizer | None = None

    def compile(self, spec: GrammarSpec) -> GrammarMatcher:
        """A fresh matcher for `spec`. What several ask for at once is built by the first of them.

        Raises:
            ParameterError: for `response_format`: the schema or grammar is invalid, uses what is not
                supported, or the model's tokenizer cannot be constrained.
        """
        with self._lock:
            known = self._cache.get(spec)
            prototype = Future[llguidance.LLMatcher]() if known is None else known
            self._cache[spec] = prototype
            self._cache.move_to_end(spec)
        if known is None:
            self._fill(prototype, spec)
        built = prototype.result()
        with self._lock:
            return GrammarMatcher(built.deep_copy(), self._vocab_size, self._eos)

    def ready(self, spec: GrammarSpec) -> bool:
        """Whether `compile` has nothing to build or to wait for."""
        with self._lock:
            prototype = self._cache.get(spec)
            return prototype is not None and prototype.done() and prototype.exception() is None

    def _fill(self, prototype: Future[llguidance.LLMatcher], spec: GrammarSpec) -> None:
        """Build, outside the lock. What fails leaves the cache as it was."""
        try:
            prototype.set_result(self._build(spec))
        except Exception as error:
            prototype.set_exception(error)
        except BaseException as error:  # a panic of the library, which is no Exception
            refusal = ParameterError(_PARAM, f"the {spec.kind} could not be compiled")
            refusal.__cause__ = error
            prototype.set_exception(refusal)
        with self._lock:
            if prototype.exception() is not None and self._cache.get(spec) is prototype:
                del self._cache[spec]
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)

    def _build(self, spec: GrammarSpec) -> llguidance.LLMatcher:
        with self._tokenizer_lock:
            tokenizer = self._load_tokenizer()
        grammar = _to_llguidance(spec)
        row_items = _JSON_ROW_ITEMS if spec.kind.startswith("json") else _GRAMMAR_ROW_ITEMS
        limits = llguidance.LLParserLimits(max_items_in_row=row_items, verbose_errors=False)
        invalid, messages = llguidance.LLMatcher.validate_grammar_with_warnings(
            grammar, tokenizer, limits=limits
        )
        if invalid:
            raise ParameterError(_PARAM, f"invalid {spec.kind}: {_brief(messages[0])}")
        matcher = llguidance.LLMatcher(tokenizer, grammar, limits=limits, log_level=0)
        # The first masks tell whether the grammar is too complex from the start (objects show their size
        # after the brace), and fill the lexer's cache, which copies share.
        probe = matcher.deep_copy()
        probe.compute_bitmask()
        forced = tokenizer.tokenize_bytes(probe.compute_ff_bytes())
        valid = forced[: probe.validate_tokens(forced)]
        if valid and probe.consume_tokens(valid):
            probe.compute_bitmask()
        for tried in (matcher, probe):
            if tried.is_error():
                raise ParameterError(_PARAM, f"invalid {spec.kind}: {_brief(tried.get_error())}")
        return matcher

    def _load_tokenizer(self) -> llguidance.LLTokenizer:
        if self._tokenizer is None:
            if not self._eos:
                raise ParameterError(_PARAM, "is not available: the model has no end-of-sequence token")
            # Imported here: it pulls in all of transformers, which engines without grammars need not load.
            from llguidance.hf import from_tokenizer

            try:
                self._tokenizer = from_tokenizer(
                    self._hf_tokenizer, n_vocab=self._vocab_size, eos_token=self._eos
                )
            except ValueError as error:
                raise ParameterError(_PARAM, f"is not available for this tokenizer: {error}") from error
        return self._tokenizer


def _to_llguidance(spec: GrammarSpec) -> str:
    try:
        spec.text.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can write
        raise ParameterError(_PARAM, f"invalid {spec.kind}: not valid Unicode: {error.reason}") from error
    if spec.kind == "regex":
        return str(llguidance.LLMatcher.grammar_from_regex(spec.text))
    if spec.kind == "lark":
        return str(llguidance.LLMatcher.grammar_from_lark(spec.text))
    text = '{"type": "object"}' if spec.kind == "json_object" else spec.text
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise ParameterError(_PARAM, f"the schema is not JSON: {error}") from error
    except RecursionError as error:
        raise ParameterError(_PARAM, "the schema is nested too deeply") from error
    if not isinstance(schema, dict | bool):
        raise ParameterError(_PARAM, "the schema must be a JSON object or a boolean")
    try:
        return str(llguidance.LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS))
    except ValueError as error:
        raise ParameterError(_PARAM, f"invalid {spec.kind}: {error}") from error


def _first(drafts: Sequence[int], ids: frozenset[int]) -> int:
    """Index of the first of `drafts` that is in `ids`, or their number."""
    return next((j for j, token in enumerate(drafts) if token in ids), len(drafts))


def _leading(drafts: Sequence[int], ids: frozenset[int]) -> int:
    """How many of `drafts` are in `ids` before the first that is not."""
    return next((j for j, token in enumerate(drafts) if token not in ids), len(drafts))


def _brief(message: str) -> str:
    """The library's message without its dump of the parser's state."""
    return message.split("<state>")[0].replace("<non-verbose/>", "").strip()[:_MAX_MESSAGE]
