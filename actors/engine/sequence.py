"""One request inside the engine: its tokens, its KV blocks, its drafts."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from actors.drafting.interface import SessionDraft
from actors.engine.controller import ControlState
from actors.engine.messages import EngineRequest, FinishReason
from actors.kv.block_pool import ROOT_KEY, BlockKey, block_key
from actors.models.runner import StateRow
from actors.sampling.pipeline import SequenceSampler
from actors.sampling.results import TokenLogprobs
from actors.verification.rule import VerificationRule

_session_ids = itertools.count(1)


@dataclass(eq=False, slots=True)
class Sequence:
    """Mutable state of one request, owned by the engine thread.

    token_ids is prompt and output; KV entries 0..num_computed-1 are valid and hold their first tokens. While
    decoding exactly the last token is not computed yet. `sampler` is None where plain argmax decides.
    """

    request: EngineRequest
    sampler: SequenceSampler | None
    rule: VerificationRule
    key: int
    max_draft_tokens: int
    """Upper bound of the draft length; 0 when this request does not speculate."""
    trees: bool = False
    """Whether drafts of this request may be trees."""
    tree_now: bool = False
    """Whether the draft of the coming round is one."""
    added_at: float = field(default_factory=time.perf_counter)
    started_at: float = 0.0
    """First admission to the batch, on the same clock."""
    token_ids: list[int] = field(init=False)
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    block_keys: list[BlockKey] = field(default_factory=list)
    num_published: int = 0
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache had at the first admission."""
    reported_first: bool = False
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    """Why this request alone cannot go on."""
    session_id: int = field(default_factory=lambda: next(_session_ids))
    session_open: bool = False
    epoch: int = 0
    control: ControlState = field(default_factory=ControlState)
    unsent_tokens: list[int] = field(default_factory=list)
    unsent_candidates: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    unsent_states: list[StateRow] = field(default_factory=list)
    """Of `unsent_tokens`, one entry a verdict, where a drafter reads them."""
    unsent_drafted: int = 0
    asked: int = 0
    """Draft tokens asked for, for the coming round; 0 when none were."""

    def __post_init__(self) -> None:
        self.token_ids = [*self.request.prompt_ids, *self.request.output_ids_so_far]

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_outputs(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def num_pending(self) -> int:
        """Known tokens whose KV is still to be computed; 1 while decoding."""
        return len(self.token_ids) - self.num_computed

    @property
    def decoding(self) -> bool:
        return self.num_pending == 1 and self.num_computed > 0

    @property
    def speculates(self) -> bool:
        return self.max_draft_tokens > 0

    @property
    def forced(self) -> bool:
        return self.request.speculation.force and self.speculates

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.request.sampling.prompt_logprobs is not None

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's log-probabilities are still to be reported: every row of it is computed."""
        return self.wants_prompt_logprobs and not self.reported_first

    def room_for_drafts(self, max_model_len: int) -> int:
        """Drafts that can still be emitted before a limit ends the request."""
        left = self.request.sampling.max_tokens - self.num_outputs
        return max(0, min(left, max_model_len - len(self.token_ids)) - 1)

    def full_block_keys(self, block_size: int, num_tokens: int) -> list[BlockKey]:
        """Keys of the full blocks inside the first `num_tokens` tokens, extending what is known."""
        while len(self.block_keys) < num_tokens // block_size:
            start = len(self.block_keys) * block_size
            parent = self.block_keys[-1] if self.block_keys else ROOT_KEY
            self.block_keys.append(block_key(parent, self.token_ids[start : start + block_size]))
        return self.block_keys[: num_tokens // block_size]


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence in a step: `num_tokens` known tokens from num_computed on, then drafts: a chain, or with
    `parents` (see `SessionDraft`) a tree."""

    seq: Sequence
    num_tokens: int
    drafts: Seq[int] = ()
    proposal: SessionDraft | None = None
    parents: Seq[int] = ()

    def __post_init__(self) -> None:
        assert 1 <= self.num_tokens <= self.seq.num_pending
        assert not self.drafts or self.seq.decoding
        assert not self.parents or len(self.parents) == len(self.drafts)

    @property
    def num_rows(self) -> int:
        return self.num_tokens + len(self.drafts)

    @property
    def completes(self) -> bool:
        """Whether every known token is computed after this step, so that a token can be emitted."""
        return self.num_tokens == self.seq.num_pending
