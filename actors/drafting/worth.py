"""Which drafter to ask, and whose guess to take: the one that promises more accepted tokens.

A guess is worth the number of its tokens that can be expected to be accepted, by its drafter's confidence. A
drafter that has not been asked yet promises what its record says of this session, less the tokens that could
be decoded in the time that it takes to draft: by all sessions that wait meanwhile.

Where guesses are joined into a tree, a drafter is worth what it adds: how often the target's next token was
among its guesses and among nobody else's. Drafting for several sessions takes hardly longer than for one: a
drafter is asked for those that are worth it together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from actors.drafting.acceptance_model import AcceptanceModel, RequestAcceptance
from actors.drafting.interface import SessionDraft
from actors.drafting.tree import depths, first_tokens, parents_of

_SMOOTHING = 0.05
_LONGEST_PAUSE_S = 1.0
"""A session that commits nothing for longer waits for something else than its target's next token."""
_EXPLORE_INTERVAL = 64
"""A drafter that promises too little is asked all the same every so many times."""
_TOKENS_A_HIT = 1.3
"""Accepted tokens that a right guess of the next one brings: itself and some of what is guessed below it."""
_CHEAP = 0.02
"""Who takes less than this share of a token's time is always asked for a tree."""
_OUTLIER = 4.0
"""A draft counts as no slower than so many times the average."""
_MUCH = 16
"""Tokens of a session since a drafter was asked for it, from which on it has more to read than a draft takes:
what a draft costs shows elsewhere."""
_ALMOST_SURE = 0.95
_UNLIKELY = 0.1
"""A token with a lower probability is hardly guessed: a tree of few tokens will not hold it."""
_LIKELY_BELOW, _LIKELY_BELOW_OTHERS = 0.5, 0.25
"""How often a further token of a drafter is right, and right where those that continue any token are not."""


@dataclass(slots=True)
class _Cost:
    """Averages over what a drafter was asked for. level_s: seconds of a token of every draft (of trees: of a
    level), by how many sessions it drafted for at once; length: tokens a draft; `added` is how often it alone
    guessed the next token, `uncovered` how likely it was, each time, that nobody else would. `distance`:
    times it is passed over until it is asked all the same, the fewer the less is known of it."""

    level_s: dict[int, float] = field(default_factory=dict)
    length: float = 0.0
    distance: int = 1
    passed_over: int = 0
    added: float = 0.5
    uncovered: float = 0.5

    def observe(self, seconds: float, lengths: Sequence[int], *, at_most: bool) -> None:
        """A call, with the lengths of its drafts. `at_most`: something else was done in it too."""
        drafts, longest = len(lengths), max(lengths, default=0)
        if not longest:
            return
        each, known, length = seconds / longest, self.level_s.get(drafts), sum(lengths) / drafts
        # Whatever disturbs a measurement adds to it, the first ones most of all.
        early = at_most or self.distance < _EXPLORE_INTERVAL
        if known is None or (early and each < known):
            self.level_s[drafts] = each
        elif not at_most:
            self.level_s[drafts] = known + _SMOOTHING * (min(each, _OUTLIER * known) - known)
        self.length += (_SMOOTHING if self.length else 1.0) * (length - self.length)

    def seconds(self, sessions: int) -> float:
        """Of a level of that many sessions; of as many as never were drafted for at once, those of the number
        that is nearest: it is tried."""
        nearest = min(self.level_s, key=lambda n: abs(n - sessions), default=None)
        return 0.0 if nearest is None else self.level_s[nearest]

    def passed(self) -> bool:
        """The drafter promises too little: whether to ask it all the same."""
        self.passed_over += 1
        return self.passed_over % self.distance == 0


@dataclass(slots=True)
class _Asked:
    """What a drafter was asked for, for a tree: `covered` are the tokens that others guess to come next, with
    their probabilities; `guesses` those that it guessed itself, empty until it has."""

    covered: Mapping[int, float]
    guesses: Collection[int] = ()

    @property
    def uncovered(self) -> float:
        """How likely it is that nobody else guessed the next token."""
        return max(0.0, 1.0 - sum(self.covered.values()))


@dataclass(slots=True)
class _Session:
    """`asked`: by drafter, since the last token. `told`: tokens since each drafter drafted."""

    acceptance: RequestAcceptance = field(default_factory=RequestAcceptance)
    committed_at: float | None = None
    asked: dict[str, _Asked] = field(default_factory=dict)
    told: dict[str, int] = field(default_factory=dict)


class DraftWorth:
    """What the drafters of one pool are worth, for its sessions. `clock` in seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._model = AcceptanceModel()
        self._costs: dict[str, _Cost] = {}
        self._sessions: dict[int, _Session] = {}
        self._pace_s: float | None = None
        """Seconds that a session takes for a token, drafting included."""

    def opened(self, session_id: int) -> None:
        self._sessions[session_id] = _Session()

    def closed(self, session_id: int) -> None:
        self._sessions.pop(session_id, None)

    def reset(self) -> None:
        self._model.reset()
        # What drafting takes is the machine's, not the sessions'.
        self._costs = {
            name: _Cost(cost.level_s, cost.length, cost.distance) for name, cost in self._costs.items()
        }

    def committed(self, session_id: int, new_tokens: Sequence[int]) -> None:
        """The target's tokens: they score the last draft and tell the pace."""
        session = self._sessions[session_id]
        if not new_tokens:
            return
        self._model.emitted(session.acceptance, new_tokens)
        self._score_guesses(session, new_tokens[0])
        for name in session.told:
            session.told[name] += len(new_tokens)
        now, before = self._clock(), session.committed_at
        session.committed_at = now
        if before is not None and now - before <= _LONGEST_PAUSE_S:
            pace = (now - before) / len(new_tokens)
            self._pace_s = pace if self._pace_s is None else self._pace_s + _SMOOTHING * (pace - self._pace_s)

    def drafted(self, name: str, drafts: Sequence[SessionDraft], seconds: float) -> None:
        """What asking a drafter gave, and how long it took for all sessions together."""
        self._timed(name, drafts, [len(draft.token_ids) for draft in drafts], seconds)

    def taken(self, draft: SessionDraft) -> None:
        """The draft that is sent, to be scored by what the target emits next."""
        self._model.proposed(self._sessions[draft.session_id].acceptance, draft, ())

    def of(self, draft: SessionDraft) -> float:
        """Tokens of a draft that can be expected to be accepted."""
        if not draft.confidence:
            return sum(self._survival(draft.session_id, draft.drafter, len(draft.token_ids)))
        product, total = 1.0, 0.0
        for confidence in draft.confidence:
            product *= confidence
            total += product
        return total

    def wants(
        self,
        name: str,
        session_id: int,
        budget: int,
        held: SessionDraft | None,
        together: int = 1,
        asking: int = 1,
    ) -> bool:
        """Whether to ask drafter `name` for up to `budget` tokens, with the guess `held` in hand already.
        `together`: sessions that wait while it drafts, `asking` of which it may draft for."""
        if held is None or self._promise(name, session_id, budget, together, asking) > self.of(held):
            return True
        return self._cost(name).passed()

    def adding(
        self, name: str, covered: Mapping[int, Mapping[int, float]], together: int = 1
    ) -> Collection[int]:
        """For which sessions to ask drafter `name` too, for trees in which the tokens `covered` (by session)
        are guessed to come next, each with a probability. `together`: sessions that wait while it drafts."""
        cost = self._cost(name)
        asked = {sid: _Asked(guessed) for sid, guessed in covered.items()}
        added = {
            sid: _TOKENS_A_HIT * min(1.0, cost.added * a.uncovered / max(cost.uncovered, 0.05))
            for sid, a in asked.items()
        }
        chosen = self._worth_most(cost, added, together) or [sid for sid in asked if cost.passed()]
        for sid in chosen:
            self._sessions[sid].asked[name] = asked[sid]
        return chosen

    def _worth_most(self, cost: _Cost, added: Mapping[int, float], together: int) -> list[int]:
        """Those sessions for which asking together brings most, in tokens, after what all lose meanwhile."""
        order = sorted(added, key=added.__getitem__, reverse=True)
        best, most, total = 0, 0.0, 0.0
        for count, sid in enumerate(order, start=1):
            total += added[sid]
            price = count * self._price(cost, together, count) * cost.length
            if total - price > most or price <= count * _CHEAP:
                best, most = count, total - price
        return order[:best]

    def guessed(self, name: str, drafts: Sequence[SessionDraft], seconds: float) -> None:
        """The trees that asking a drafter gave, and how long it took for all sessions together."""
        levels = []
        for draft in drafts:
            levels.append(max(depths(parents_of(draft)), default=0))
            asked = self._sessions[draft.session_id].asked.get(name)
            if asked is not None:
                asked.guesses = first_tokens([draft])
        self._timed(name, drafts, levels, seconds)

    def least_survival(self, name: str, continued: bool, together: int = 1, asking: int = 1) -> float:
        """How likely a token of a tree must be accepted for drafter `name` to draft another below it.
        `continued`: somebody else guesses there for nothing. `together`: sessions that wait while it
        drafts, for `asking` of them."""
        least = self._price(self._cost(name), together, asking)
        least /= _LIKELY_BELOW_OTHERS if continued else _LIKELY_BELOW
        return min(_ALMOST_SURE, least)  # whoever is asked drafts a token

    def _cost(self, name: str) -> _Cost:
        return self._costs.setdefault(name, _Cost())

    def _timed(
        self, name: str, drafts: Sequence[SessionDraft], lengths: Sequence[int], seconds: float
    ) -> None:
        cost, sessions = self._cost(name), [self._sessions[draft.session_id] for draft in drafts]
        much_to_read = any(session.told.get(name, _MUCH) >= _MUCH for session in sessions)
        cost.observe(seconds, lengths, at_most=much_to_read)
        if any(lengths):
            cost.distance = min(_EXPLORE_INTERVAL, 2 * cost.distance)
        for session in sessions:
            session.told[name] = 0

    def _price(self, cost: _Cost, together: int, asking: int) -> float:
        """Tokens that the sessions which wait could decode in the time of one draft token of each that asks,
        the share of one of these."""
        return together * cost.seconds(asking) / asking / self._pace_s if self._pace_s else 0.0

    def _score_guesses(self, session: _Session, token: int) -> None:
        for name, asked in session.asked.items():
            if not asked.guesses:  # nothing was guessed: the drafter was not ready
                continue
            cost = self._costs[name]
            alone = token in asked.guesses and asked.covered.get(token, 0.0) < _UNLIKELY
            cost.added += _SMOOTHING * (alone - cost.added)
            cost.uncovered += _SMOOTHING * (asked.uncovered - cost.uncovered)
        session.asked.clear()

    def _promise(self, name: str, session_id: int, budget: int, together: int, asking: int) -> float:
        cost = self._cost(name)
        length = min(budget, round(cost.length)) if cost.length else budget
        price = length * self._price(cost, together, asking)
        return sum(self._survival(session_id, name, length)) - price

    def _survival(self, session_id: int, name: str, length: int) -> list[float]:
        return self._model.survival(self._sessions[session_id].acceptance, name, length)
