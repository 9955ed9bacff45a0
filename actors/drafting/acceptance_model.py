"""How often drafts are right: acceptance by drafter and position, per request and overall.

Every proposal is scored against the tokens that the target goes on to emit, whether or not it was verified.
Under the coupled rule a draft is accepted exactly when it equals the target's token, so scoring drafts that
nobody verified costs nothing and lets a drafter that is switched off prove itself again. Of drafts that were
drawn for another rule, only what was verified counts.

What is sampled at a high temperature is hard to foresee: requests of like temperature have averages of their
own, which begin as those of all.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar

from actors.drafting.interface import SessionDraft
from actors.drafting.tree_acceptance import PendingTree, TreeRecord

MAX_POSITIONS = 16
_PRIOR = 0.5
_GLOBAL_SMOOTHING = 0.0025
"""Averages over fewer drafts fall by chance below what pays, and are then renewed by probes alone: seldom. A
request that fares otherwise is known by its own record."""
_LOCAL_SMOOTHING = 0.2
_LOCAL_DECAY = 0.95
_PRIOR_WEIGHTS = (3.0, 8.0, 20.0)
"""What the averages may be worth beside a request's own record, in accepted tokens."""
_FORESIGHT_DECAY, _FIRST_LEAD = 0.9995, 1.0
"""Of the likelihoods by which one of them is chosen: what is kept of them a draft, and what the first has in
advance."""
_LEAST_RATE, _MAX_RATE = 0.01, 0.98
_KINDS = (0.0, 0.6, 1.2)
"""Highest temperature of each kind of request but the last."""
_KIND_TRIALS = 4
"""What the averages of all are worth to a new kind, in drafts."""
Evidence = tuple[tuple[float, ...], tuple[int, ...]]
"""(conditional acceptance by position, tokens scored there), up to the last position that was scored."""


class _Record(Protocol):
    def faded(self) -> Self:
        """A copy that gives way to what comes."""
        ...


R = TypeVar("R", bound=_Record)


@dataclass(slots=True)
class _ByKind(Generic[R]):
    """What became of all requests' drafts, and of those of each kind of request."""

    overall: R
    kinds: dict[int, R] = field(default_factory=dict)

    def known(self, kind: int) -> R:
        """What there is to know of a kind."""
        return self.kinds.get(kind, self.overall)

    def to_record(self, kind: int) -> R:
        """The kind's own record. It begins as what is known of all."""
        record = self.kinds.get(kind)
        if record is None:
            record = self.kinds[kind] = self.overall.faded()
        return record


@dataclass(slots=True)
class _Averages:
    """By place. Those from `reached` on, where none of these drafts has been, rise and fall with the last
    one that was: where first tokens are wrong, nothing is seen of what comes after them."""

    accept: list[float] = field(default_factory=lambda: [_PRIOR] * MAX_POSITIONS)
    trials: list[int] = field(default_factory=lambda: [0] * MAX_POSITIONS)
    reached: int = 0
    _began: float = 1.0
    """What the last place that was reached had been taken for."""
    _before: float = 1.0
    """How much the places before it had risen by then."""

    def rate(self, at: int) -> float:
        return self.accept[at] if at < self.reached else min(_MAX_RATE, self.accept[at] * self._risen())

    def rates(self) -> list[float]:
        return [self.rate(at) for at in range(MAX_POSITIONS)]

    def _risen(self) -> float:
        if not self.reached:
            return 1.0
        return self._before * self.accept[self.reached - 1] / max(self._began, _LEAST_RATE)

    def faded(self) -> _Averages:
        return _Averages(self.rates(), [min(n, _KIND_TRIALS) for n in self.trials])

    def at_exit(self, exits: _Averages, overall: _Averages, most_trials: int) -> _Averages:
        """Those of another exit, as much better or worse than its overall ones as these are, which counts for
        so many drafts at most."""
        accept = [
            min(_MAX_RATE, other * (mine / max(usual, _LEAST_RATE)))
            for mine, other, usual in zip(self.rates(), exits.rates(), overall.rates(), strict=True)
        ]
        return _Averages(accept, [min(n, most_trials) for n in exits.trials])

    def record(self, at: int, hit: bool) -> None:
        while self.reached <= at:
            began, self._before = self.rate(self.reached), self._risen()
            self.accept[self.reached] = self._began = began
            self.reached += 1
        self.trials[at] += 1
        self.accept[at] += _step(self.trials[at]) * (hit - self.accept[at])

    def evidence(self) -> Evidence:
        used = max((i + 1 for i, n in enumerate(self.trials) if n), default=0)
        return tuple(self.accept[:used]), tuple(self.trials[:used])


@dataclass(slots=True)
class _Share:
    """How often a drafter that was asked had a guess, overall."""

    available: float = _PRIOR
    trials: int = 0

    def record(self, answered: bool) -> None:
        self.trials += 1
        self.available += _step(self.trials) * (answered - self.available)


@dataclass(slots=True)
class _Local:
    """hits: acceptances; expected: what the overall averages would have predicted for the same trials;
    available: how often there was a guess, beginning with what it was overall."""

    available: float
    hits: float = 0.0
    expected: float = 0.0

    def add(self, hits: float, expected: float) -> None:
        self.hits = self.hits * _LOCAL_DECAY + hits
        self.expected = self.expected * _LOCAL_DECAY + expected

    def scale(self, prior_weight: float) -> float:
        """How much better than expected, where the averages are worth so many accepted tokens."""
        return (prior_weight + self.hits) / (prior_weight + self.expected)


@dataclass(slots=True)
class _OwnRecords:
    """What requests' own records are worth against the averages: of several prior weights that which would
    have foreseen best what became of drafts, as Poisson counts. Where requests are much alike they differ by
    luck, and their records mislead; where they are not, little else is known of a new one."""

    foresight: list[float] = field(default_factory=lambda: [_FIRST_LEAD] + [0.0] * (len(_PRIOR_WEIGHTS) - 1))
    """Log-likelihoods, up to what all have in common."""

    @property
    def prior_weight(self) -> float:
        return _PRIOR_WEIGHTS[self.foresight.index(max(self.foresight))]

    def scale(self, local: _Local) -> float:
        """How much better than expected a request fares."""
        return local.scale(self.prior_weight)

    def observe(self, local: _Local, hits: float, expected: float) -> None:
        """So many accepted tokens came of a draft of which the averages expect `expected`."""
        for at, weight in enumerate(_PRIOR_WEIGHTS):
            scale = local.scale(weight)
            gained = hits * math.log(scale) - expected * scale
            self.foresight[at] = _FORESIGHT_DECAY * self.foresight[at] + gained
        local.add(hits, expected)


@dataclass(slots=True)
class _Pending:
    drafter: str
    token_ids: tuple[int, ...]
    exit_depth: int | None = None
    position: int = 0
    drawn: bool = False
    """Whether it was drawn from a distribution that the target verifies it by. What is accepted is then not
    what equals the target's own token, so that what was not verified says nothing."""


@dataclass(slots=True)
class RequestAcceptance:
    """One request's own record, and the proposal being scored. `kind`: see `kind_of`."""

    kind: int = 0
    drafters: dict[str, _Local] = field(default_factory=dict)
    pending: _Pending | PendingTree | None = None


def kind_of(temperature: float) -> int:
    """Requests whose next tokens are about as easy to foresee."""
    return bisect_left(_KINDS, temperature)


class AcceptanceModel:
    """P(token j accepted | its ancestors accepted) per drafter: the average by position over requests of its
    kind, scaled by how much better or worse than expected this request has fared so far."""

    def __init__(self) -> None:
        self._averages: defaultdict[str, _ByKind[_Averages]] = defaultdict(lambda: _ByKind(_Averages()))
        self._trees: defaultdict[str, _ByKind[TreeRecord]] = defaultdict(lambda: _ByKind(TreeRecord()))
        self._exits: defaultdict[int, _Averages] = defaultdict(_exit_averages)
        self._shares: defaultdict[str, _Share] = defaultdict(_Share)
        self._own_records: defaultdict[str, _OwnRecords] = defaultdict(_OwnRecords)

    def reset(self) -> None:
        for known in (self._averages, self._trees, self._exits, self._shares, self._own_records):
            known.clear()

    def proposed(self, request: RequestAcceptance, draft: SessionDraft | None, names: Iterable[str]) -> None:
        """Start scoring a proposal (None or empty: nobody had a guess)."""
        self._end_tree(request)
        answered = draft.drafter if draft is not None and draft.token_ids else None
        for name in names:
            self._asked(request, name, name == answered)
        if answered is not None and draft is not None:
            request.drafters.setdefault(answered, self._local(request, answered))
            request.pending = _Pending(answered, draft.token_ids, draft.exit_depth, drawn=bool(draft.q))
        else:
            request.pending = None

    def proposed_tree(self, request: RequestAcceptance, draft: SessionDraft | None, name: str) -> None:
        """The same for a request whose proposals are trees (with their parents), recorded as `name`."""
        self._end_tree(request)
        answered = draft is not None and bool(draft.token_ids)
        self._asked(request, name, answered)
        request.pending = PendingTree(name, draft) if draft is not None and answered else None

    def _local(self, request: RequestAcceptance, name: str) -> _Local:
        """What is known of a request and a drafter, or would be if it asked."""
        return request.drafters.get(name) or _Local(self._shares.get(name, _Share()).available)

    def _asked(self, request: RequestAcceptance, name: str, answered: bool) -> None:
        local = request.drafters.setdefault(name, self._local(request, name))
        local.available += _LOCAL_SMOOTHING * (answered - local.available)
        self._shares[name].record(answered)

    def emitted(self, request: RequestAcceptance, token_ids: Iterable[int], verified: int = 0) -> None:
        """Score the pending proposal with tokens that the target emitted in a round that verified so many of
        its tokens."""
        if isinstance(request.pending, _Pending) and request.pending.drawn:
            request.pending.token_ids = request.pending.token_ids[:verified]
            if not verified:
                request.pending = None
        for token in token_ids:
            pending = request.pending
            if pending is None:
                return
            if isinstance(pending, PendingTree):
                if not pending.advance(token):
                    self._end_tree(request)
                continue
            hit = pending.token_ids[pending.position] == token
            self._record(request, pending, hit)
            pending.position += 1
            if not hit or pending.position == len(pending.token_ids):
                request.pending = None

    def _record(self, request: RequestAcceptance, pending: _Pending, hit: bool) -> None:
        known = self._averages[pending.drafter]
        averages = known.to_record(request.kind)
        at = min(pending.position, MAX_POSITIONS - 1)
        local = request.drafters[pending.drafter]
        self._own_records[pending.drafter].observe(local, hit, averages.rate(at))
        known.overall.record(at, hit)
        averages.record(at, hit)
        if pending.exit_depth is not None:
            self.observe_exit(pending.exit_depth, at, hit)

    def _end_tree(self, request: RequestAcceptance) -> None:
        """Score a tree that the target has left, or that another proposal follows before it has."""
        pending, request.pending = request.pending, None
        if not isinstance(pending, PendingTree) or not (pending.left or pending.path):
            return
        local = request.drafters[pending.name]
        known = self._trees[pending.name]
        record = known.to_record(request.kind)
        known.overall.record(pending)
        hits, expected = record.record(pending)
        self._own_records[pending.name].observe(local, hits, expected)
        if pending.draft.exit_depth is not None:
            for place, hit in enumerate(pending.exit_hits()):
                self.observe_exit(pending.draft.exit_depth, place, hit)

    def observe_exit(self, exit_depth: int, position: int, hit: bool) -> None:
        """A token that an exit drafted was scored; those before it in its draft were right."""
        self._exits[exit_depth].record(min(position, MAX_POSITIONS - 1), hit)

    def adopt(self, drafter: str, exit_depth: int) -> None:
        """`drafter` goes on at another exit: what is known of that exit, if anything, holds for it."""
        exits = self._exits.get(exit_depth) or _Averages()
        before = self._averages[drafter]
        # Of a kind that is the only one, what is known of the exit holds as it is.
        most = _KIND_TRIALS if len(before.kinds) > 1 else max(exits.trials)
        kinds = {kind: known.at_exit(exits, before.overall, most) for kind, known in before.kinds.items()}
        self._averages[drafter] = _ByKind(deepcopy(exits), kinds)

    def survival(self, request: RequestAcceptance, drafter: str, length: int) -> list[float]:
        """P(the first j + 1 tokens are all accepted) for j < length."""
        known = self._averages.get(drafter)
        averages = None if known is None else known.known(request.kind)
        scale = self._own_records[drafter].scale(self._local(request, drafter))
        product, result = 1.0, []
        for position in range(length):
            overall = averages.rate(min(position, MAX_POSITIONS - 1)) if averages else _PRIOR
            product *= min(_MAX_RATE, overall * scale)
            result.append(product)
        return result

    def expected_survival(self, request: RequestAcceptance, names: Iterable[str], length: int) -> list[float]:
        """The same before it is known which drafter will answer, weighted by how often each has a guess."""
        total = [0.0] * length
        for name in names:
            share = self._local(request, name).available
            for position, value in enumerate(self.survival(request, name, length)):
                total[position] += share * value
        return [min(1.0, value) for value in total]

    def tree_survival(self, request: RequestAcceptance, draft: SessionDraft, name: str) -> list[float]:
        """P(token j accepted) for the tokens of a tree that came, never rising."""
        record = self._tree_record(request, name)
        scale = self._own_records[name].scale(self._local(request, name))
        return [min(_MAX_RATE, likely * scale) for likely in record.expected(draft)]

    def expected_tree_survival(self, request: RequestAcceptance, name: str, length: int) -> list[float]:
        """The same before a tree came."""
        record = self._tree_record(request, name)
        local = self._local(request, name)
        scale = self._own_records[name].scale(local)
        return [local.available * min(_MAX_RATE, likely * scale) for likely in record.by_place[:length]]

    def _tree_record(self, request: RequestAcceptance, name: str) -> TreeRecord:
        known = self._trees.get(name)
        return TreeRecord() if known is None else known.known(request.kind)

    def table(self) -> dict[str, list[float]]:
        """Conditional acceptance by drafter and position, for people; of trees, acceptance by place."""
        chains = {name: known.overall.rates() for name, known in self._averages.items()}
        trees = {name: known.overall.by_place for name, known in self._trees.items()}
        return {name: [round(rate, 3) for rate in rates[:8]] for name, rates in (chains | trees).items()}

    def evidence(self) -> dict[str, Evidence]:
        """By drafter."""
        return {name: known.overall.evidence() for name, known in self._averages.items()}

    def exit_evidence(self) -> dict[int, Evidence]:
        """By exit depth of the nested drafter, shadow scoring included."""
        return {depth: averages.evidence() for depth, averages in self._exits.items()}


def _exit_averages() -> _Averages:
    return _Averages(reached=MAX_POSITIONS)  # the router fills gaps


def _step(trials: int) -> float:
    """A plain mean at first, so that the prior fades quickly, then an exponential one."""
    return max(_GLOBAL_SMOOTHING, 1.0 / (trials + 2))
