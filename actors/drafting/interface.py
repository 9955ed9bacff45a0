"""Who proposes tokens: the two seams of drafting, and the messages that cross them.

`Drafter` is one method of guessing (prompt lookup, Token Recycling, nested model). `DraftSource` is what an
engine talks to: it hides whether drafters run in this process or behind a gRPC stream, and never blocks
longer than told. Drafts are advice: nothing here can change what a target emits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from actors.models.cores import Cores
from actors.sampling.params import DraftSampling

if TYPE_CHECKING:
    from actors.drafting.coupling import Coupling
    from actors.drafting.foreign import ForeignTarget
    from actors.models.runner import StateRow
    from actors.text.tokenizer_file import TokenizerFile

NESTED = "nested"
"""Name of the nested drafter, whose exits a router assigns."""
TREE = "tree"
"""What a proposal calls itself that joins the guesses of all drafters."""
MAX_HELD_CANDIDATES = 256
"""Verified rows of a session that a source keeps for learning drafters until it tells them; older ones are
dropped."""
MAX_HELD_STATES = 64
"""Tokens whose states a source keeps until it tells them; drafters that read states take the last ones."""

SCOPE_SHIFT = 64
"""Ids of sessions in a draft worker have their stream's number above so many bits."""

ResetScope = Literal["all", "caches"]
"""Of what requests share: `caches` are prefix caches and what drafters remember of texts, `all` is these and
what was measured of drafts (acceptance, what drafters are worth, the account)."""

DraftErrorCode = Literal["unknown_session", "stale_epoch", "capacity", "unsupported", "internal"]


@dataclass(frozen=True, slots=True)
class SessionOpen:
    """A session is one request on one target worker. `token_ids` is the prompt, or the prompt and what has
    been emitted when a worker is told again; `prompt_len` marks the boundary. `trees`: whether the target can
    verify a tree of tokens. Inside a draft worker, `vocabulary` names the one that the tokens are of, equal
    for sessions that share it, `foreign` says how to read them when they are not the nested drafter's own,
    and `ahead` whether its drafts may be prepared while the target verifies."""

    session_id: int
    token_ids: tuple[int, ...]
    prompt_len: int
    sampling: DraftSampling
    epoch: int = 0
    trees: bool = False
    vocabulary: str = ""
    foreign: ForeignTarget | None = None
    ahead: bool = False


@dataclass(frozen=True, slots=True)
class NestedWish:
    """How the nested drafter is to draft for a session.

    exit: depth in layers where the session pins none; None for the drafter's own choice.
    cap: longest draft, 0 to pass the drafter over; None for no limit but the budget.
    shadow_exit, shadow_length: also draft so many tokens at that exit, for scoring only, once nobody waits; a
        length of 0 asks for none.
    """

    exit: int | None = None
    cap: int | None = None
    shadow_exit: int | None = None
    shadow_length: int = 0


@dataclass(frozen=True, slots=True)
class SessionUpdate:
    """The verdict of the last round and the wish for the next.

    epoch: counts updates of a session from 1; a reply carries the epoch it answers.
    new_tokens: committed since the previous update (may be empty), in order.
    drafted: tokens of the previous proposal that were verified.
    candidates: (input token id, its most probable next ids, best first) of verified rows, for learning
        drafters; empty unless the source asked for them.
    budget: draft tokens wanted next, 0 for none. drafter, exit_depth: pinned, or None.
    nested: what a router wants of the nested drafter, None for nothing.
    chain: a chain is wanted, also of a session that takes trees.
    states: the target's last hidden states, before its final norm, where it emitted each of the last new
        tokens, for drafters in this process that read them. They cross no wire.
    """

    session_id: int
    epoch: int
    new_tokens: tuple[int, ...]
    budget: int
    drafted: int = 0
    candidates: tuple[tuple[int, tuple[int, ...]], ...] = ()
    drafter: str | None = None
    exit_depth: int | None = None
    nested: NestedWish | None = None
    chain: bool = False
    states: Sequence[StateRow] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class SessionDraft:
    """A proposal. `parents[j]` < j is the index of token j's parent, -1 for the last committed token; empty
    for a chain. A tree that has to be cut loses its last tokens: they are ordered by how likely they are to
    be accepted. `confidence[j]` estimates P(token j accepted | its parent accepted). `sources[j]` names the
    drafter of token j where several took part, else it is empty. `q[j]` holds the exact (ids, probabilities)
    that token j was drawn from, only under rules that need it and only for sampling drafters; an empty q
    means a deterministic draft (one-hot)."""

    session_id: int
    epoch: int
    token_ids: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    drafter: str = ""
    exit_depth: int | None = None
    confidence: tuple[float, ...] = ()
    sources: tuple[str, ...] = ()
    q: tuple[tuple[tuple[int, ...], tuple[float, ...]], ...] = ()
    error: DraftErrorCode | None = None
    error_message: str = ""

    def __post_init__(self) -> None:
        if self.parents and len(self.parents) != len(self.token_ids):
            raise ValueError("parents must be empty or one a token")
        if any(not -1 <= parent < j for j, parent in enumerate(self.parents)):
            raise ValueError("a token's parent must come before it")
        if self.sources and len(self.sources) != len(self.token_ids):
            raise ValueError("sources must be empty or one a token")
        if self.confidence and len(self.confidence) != len(self.token_ids):
            raise ValueError("confidence must be empty or one a token")
        if self.q and len(self.q) != len(self.token_ids):
            raise ValueError("q must be empty or one a token")


@dataclass(frozen=True, slots=True)
class DraftQuery:
    """Ask a drafter for up to `budget` tokens after what it knows of the session.

    For a drafter with a model: `coupling` replaces the session's sampling. With `tree` the answer may be a
    tree, drafted on only below tokens that are accepted with a probability of `min_survival`. The draft goes
    on after the tokens `after`, as if they had been committed, which `survival` gives the probability of.
    `shadow`: it is for scoring only.
    """

    session_id: int
    epoch: int
    budget: int
    exit_depth: int | None = None
    coupling: Coupling | None = None
    tree: bool = False
    min_survival: float = 0.0
    after: tuple[int, ...] = ()
    survival: float = 1.0
    shadow: bool = False


class Drafter(Protocol):
    """One method of guessing. Called from one thread. Sessions are told with `open`, grown with `commit`."""

    @property
    def name(self) -> str: ...

    @property
    def learns(self) -> bool:
        """Whether `commit` wants candidates."""
        ...

    def open(self, session: SessionOpen) -> None: ...

    def commit(
        self,
        session_id: int,
        new_tokens: Sequence[int],
        candidates: Sequence[tuple[int, Sequence[int]]] = (),
    ) -> None:
        """Append committed tokens. The drafter itself keeps what of its speculation they confirm."""
        ...

    def propose(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
        """One draft a query, in order, computed as one batch; an empty draft means no guess."""
        ...

    def close(self, session_id: int) -> None: ...

    def reset(self, scope: ResetScope = "all") -> None:
        """Forget what sessions share, see `ResetScope`; sessions stay open."""
        ...


@dataclass(frozen=True, slots=True)
class TargetIdentity:
    """What drafters must know of the target worker that they draft for. `vocab_size` is the number of logits;
    `tokenizer_hash` is equal for two models exactly when drafts may cross unchanged; `tokenizer` gives the
    tokenizer to a draft worker whose own is another. `states_hash` identifies weights whose hidden states
    this target can give, empty for a target that gives none. `cores`: those that the target computes on.
    `weight`: its share of a draft worker's time, relative to others, where it is short."""

    target_id: str
    model: str
    vocab_size: int
    tokenizer_hash: str = ""
    tokenizer: Callable[[], TokenizerFile] | None = field(default=None, compare=False, repr=False)
    states_hash: str = field(default="", compare=False)
    cores: Cores = field(default_factory=Cores, compare=False)
    weight: float = field(default=1.0, compare=False)


@dataclass(frozen=True, slots=True)
class ServedRounds:
    """What draft workers have done for a target so far.

    rounds: that they answered with drafts. seconds: from a round's arrival there to its answer, over all of
    them. steps: of the nested drafter for them, one after the other. tokens: of nested drafts.
    """

    rounds: int = 0
    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0


class DraftSource(Protocol):
    """What an engine asks for drafts. One `submit` a round carries every wish, and the verdicts of those who
    wish; what the others have to tell may come rounds later."""

    @property
    def drafters(self) -> Collection[str]:
        """Names a request may pin."""
        ...

    @property
    def own_drafters(self) -> Collection[str]:
        """Those of them that draft in this process."""
        ...

    @property
    def wants_candidates(self) -> int:
        """Candidates wanted per verified row, 0 for none."""
        ...

    @property
    def wants_states(self) -> bool:
        """Whether updates are to come with the target's states."""
        ...

    def open(self, session: SessionOpen) -> None: ...

    def submit(self, updates: Sequence[SessionUpdate], timeout_s: float = 0.0) -> None:
        """Send verdicts and wishes; returns at once. `timeout_s` is how long the `collect` that follows will
        wait, 0 for not known."""
        ...

    def collect(self, wanted: Mapping[int, int], timeout_s: float) -> dict[int, SessionDraft]:
        """Drafts for `wanted` (session id -> epoch) that arrive within `timeout_s`; late ones are dropped."""
        ...

    def take_shadows(self) -> Sequence[SessionDraft]:
        """Drafts for scoring that arrived since the last call, with the epoch that asked for them."""
        ...

    def assign(self, worker_id: str | None) -> None:
        """Draft with this worker from now on; None, or one that is away: with any."""
        ...

    def latency_s(self) -> Mapping[str, float]:
        """Average seconds of a round trip without the drafting, by draft worker; empty where nothing is
        remote."""
        ...

    def served(self) -> ServedRounds:
        """By draft workers; zeros where nothing is remote."""
        ...

    def close_session(self, session_id: int) -> None: ...

    def reset(self, scope: ResetScope = "all") -> None: ...

    def stats(self) -> dict[str, object]: ...

    def close(self) -> None: ...
