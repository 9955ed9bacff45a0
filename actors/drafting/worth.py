"""Which drafter to ask, and whose guess to take: the one that promises more accepted tokens.

A guess is worth the number of its tokens that can be expected to be accepted, by its drafter's confidence. A
drafter that has not been asked yet promises what its record says of this session, less the tokens that could
be decoded in the time that it takes to draft: by all sessions that wait meanwhile.

Where guesses are joined into a tree, a drafter is worth what it adds: how often the target's next token was
among its guesses and among nobody else's. Drafting for several sessions takes hardly longer than for one: a
drafter is asked for those that are worth it together.

What drafting takes is the machine's. What a draft brings, and how long a token takes without, is each
target's own: a draft worker drafts for fast and for slow ones, which may wait together. Time counts alike for
all that wait, so that a token is worth the more the longer its target takes for one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from actors.drafting.acceptance_model import AcceptanceModel, RequestAcceptance, kind_of
from actors.drafting.interface import SCOPE_SHIFT, SessionDraft
from actors.drafting.tree import depths, first_tokens, parents_of

MAX_TARGETS = 128
"""So many targets are known, those that opened a session last: one may have none for a while."""
_SMOOTHING = 0.05
_PAUSE = 32.0
"""A session that takes so many times its target's usual time for a token waits for something else than the
next token, unless it takes as long the time after."""
_EARLY_CALLS = 6
"""Of what a drafter takes, the least of so many first calls is believed."""
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


@dataclass(slots=True, eq=False)
class _Cost:
    """What a drafter takes (at one exit, where it has several). level_s: average seconds of a token of every
    draft (of trees: of a level), by how many sessions it drafted for at once."""

    level_s: dict[int, float] = field(default_factory=dict)
    calls: int = 0

    def observe(self, seconds: float, lengths: Sequence[int], *, at_most: bool) -> None:
        """A call, with the lengths of its drafts, not all of them 0. `at_most`: something else was done in it
        too."""
        drafts = len(lengths)
        each, known = seconds / max(lengths), self.level_s.get(drafts)
        # Whatever disturbs a measurement adds to it, the first ones most of all.
        early = at_most or self.calls < _EARLY_CALLS
        self.calls += 1
        if known is None or (early and each < known):
            self.level_s[drafts] = each
        elif not at_most:
            self.level_s[drafts] = known + _SMOOTHING * (min(each, _OUTLIER * known) - known)

    def seconds(self, sessions: int) -> float:
        """Of a level of that many sessions; of as many as never were drafted for at once, those of the number
        that is nearest: it is tried."""
        known = self.level_s.get(sessions)
        if known is not None:
            return known
        nearest = min(self.level_s, key=lambda n: abs(n - sessions), default=None)
        return 0.0 if nearest is None else self.level_s[nearest]


@dataclass(slots=True, eq=False)
class _Record:
    """A drafter's drafts for one target, on average. cost: of calls like its last one; length: tokens (of
    trees: levels) a draft; `added` is how often it alone guessed the next token, `uncovered` how likely it
    was, each time, that nobody else would. `distance`: times it is passed over until it is asked all the
    same, the fewer the less is known of it."""

    cost: _Cost = field(default_factory=_Cost)
    length: float = 0.0
    distance: int = 1
    passed_over: int = 0
    added: float = 0.5
    uncovered: float = 0.5

    def drafted(self, cost: _Cost, lengths: Sequence[int]) -> None:
        """Some of the target's drafts came of one call."""
        if not any(lengths):
            return
        self.cost = cost
        length = sum(lengths) / len(lengths)
        self.length += (_SMOOTHING if self.length else 1.0) * (length - self.length)
        self.distance = min(_EXPLORE_INTERVAL, 2 * self.distance)

    def passed(self) -> bool:
        """The drafter promises too little: whether to ask it all the same."""
        self.passed_over += 1
        return self.passed_over % self.distance == 0

    def reset(self) -> None:
        self.passed_over, self.added, self.uncovered = 0, 0.5, 0.5


@dataclass(slots=True, eq=False)
class _Target:
    """What the drafters are to one target. `pace_s`: seconds that a session takes for a token, drafting
    included."""

    model: AcceptanceModel = field(default_factory=AcceptanceModel)
    records: dict[str, _Record] = field(default_factory=dict)
    pace_s: float | None = None

    def record(self, name: str) -> _Record:
        record = self.records.get(name)
        if record is None:
            record = self.records[name] = _Record()
        return record

    def price(self, name: str, together: int, asking: int) -> float:
        """Tokens that a target decodes in the time of one draft token of each session that asks, times
        the sessions that wait; the share of one that asks."""
        if not self.pace_s:
            return 0.0
        return together * self.record(name).cost.seconds(asking) / asking / self.pace_s

    def reset(self) -> None:
        self.model.reset()
        # What drafting takes is the machine's, not the sessions'.
        for record in self.records.values():
            record.reset()


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
    """`asked`: by drafter, since the last token. `told`: tokens since each drafter drafted. `paused`: the
    last tokens took long."""

    target: _Target
    acceptance: RequestAcceptance
    committed_at: float | None = None
    paused: bool = False
    asked: dict[str, _Asked] = field(default_factory=dict)
    told: dict[str, int] = field(default_factory=dict)

    def took(self, token_s: float) -> None:
        """So many seconds a token: they tell the target's pace, unless they are a pause."""
        pace_s, paused = self.target.pace_s, self.paused
        self.paused = pace_s is not None and token_s > _PAUSE * pace_s
        if pace_s is None:
            self.target.pace_s = token_s
        elif paused or not self.paused:
            self.target.pace_s = pace_s + _SMOOTHING * (token_s - pace_s)

    def score_guesses(self, token: int) -> None:
        for name, asked in self.asked.items():
            if not asked.guesses:  # nothing was guessed: the drafter was not ready
                continue
            record = self.target.record(name)
            alone = token in asked.guesses and asked.covered.get(token, 0.0) < _UNLIKELY
            record.added += _SMOOTHING * (alone - record.added)
            record.uncovered += _SMOOTHING * (asked.uncovered - record.uncovered)
        self.asked.clear()


class DraftWorth:
    """What the drafters of one pool are worth to each of its targets (see `SCOPE_SHIFT`). `clock` in
    seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._costs: dict[tuple[str, int], _Cost] = {}
        """By drafter and exit depth, 0 for a drafter without exits."""
        self._sessions: dict[int, _Session] = {}
        self._targets: dict[int, _Target] = {}
        """By scope of their sessions; last the one that opened a session last."""

    def opened(self, session_id: int, temperature: float = 0.0) -> None:
        scope = session_id >> SCOPE_SHIFT
        target = self._targets.pop(scope, None) or _Target()
        self._targets[scope] = target
        if len(self._targets) > MAX_TARGETS:
            del self._targets[next(iter(self._targets))]
        self._sessions[session_id] = _Session(target, RequestAcceptance(kind_of(temperature)))

    def closed(self, session_id: int) -> None:
        self._sessions.pop(session_id, None)

    def reset(self) -> None:
        for target in self._targets.values():
            target.reset()

    def committed(self, session_id: int, new_tokens: Sequence[int], verified: int = 0) -> None:
        """The target's tokens: they score the last draft, so many tokens of which were verified, and tell the
        pace."""
        session = self._sessions[session_id]
        if not new_tokens:
            return
        session.target.model.emitted(session.acceptance, new_tokens, verified)
        session.score_guesses(new_tokens[0])
        for name in session.told:
            session.told[name] += len(new_tokens)
        now, before = self._clock(), session.committed_at
        session.committed_at = now
        if before is not None:
            session.took((now - before) / len(new_tokens))

    def drafted(self, name: str, drafts: Sequence[SessionDraft], seconds: float) -> None:
        """What asking a drafter gave, and how long it took for all sessions together."""
        self._timed(name, drafts, [len(draft.token_ids) for draft in drafts], seconds)

    def taken(self, draft: SessionDraft) -> None:
        """The draft that is sent, to be scored by what the target emits next."""
        session = self._sessions[draft.session_id]
        session.target.model.proposed(session.acceptance, draft, ())

    def of(self, draft: SessionDraft) -> float:
        """Tokens of a draft that can be expected to be accepted."""
        if not draft.confidence:
            return self._expected(self._sessions[draft.session_id], draft.drafter, len(draft.token_ids))
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
        if held is None:
            return True
        session = self._sessions[session_id]
        record = session.target.record(name)
        length = min(budget, round(record.length)) if record.length else budget
        price = length * session.target.price(name, together, asking)
        return self._expected(session, name, length) - price > self.of(held) or record.passed()

    def adding(
        self, name: str, covered: Mapping[int, Mapping[int, float]], together: int = 1
    ) -> Collection[int]:
        """For which sessions to ask drafter `name` too, for trees in which the tokens `covered` (by session)
        are guessed to come next, each with a probability. `together`: sessions that wait while it drafts."""
        asked = {sid: _Asked(guessed) for sid, guessed in covered.items()}
        chosen = self._worth_most(name, asked, together)
        if len(chosen) < len(asked):
            # A target learns nothing from what is drafted for others.
            served = {self._sessions[sid].target for sid in chosen}
            for sid in asked:
                target = self._sessions[sid].target
                if target not in served and target.record(name).passed():
                    chosen.append(sid)
        for sid in chosen:
            self._sessions[sid].asked[name] = asked[sid]
        return chosen

    def _worth_most(self, name: str, asked: Mapping[int, _Asked], together: int) -> list[int]:
        """Those sessions for which asking together saves most time, after what all lose meanwhile; and those
        whose target's pace is not known yet."""
        free: list[int] = []
        gains: list[tuple[float, float, _Record, int]] = []
        for sid, what in asked.items():
            target = self._sessions[sid].target
            if target.pace_s:
                record = target.record(name)
                hits = min(1.0, record.added * what.uncovered / max(record.uncovered, 0.05))
                gains.append((_TOKENS_A_HIT * hits * target.pace_s, target.pace_s, record, sid))
            else:
                free.append(sid)
        gains.sort(key=itemgetter(0), reverse=True)
        best, most, total, cheap_s, length = 0, 0.0, 0.0, 0.0, 0.0
        costs: set[_Cost] = set()
        for count, (gain_s, pace_s, record, _) in enumerate(gains, start=1):
            total += gain_s
            cheap_s += _CHEAP * pace_s
            length = max(length, record.length)
            costs.add(record.cost)
            price_s = together * length * max([cost.seconds(count) for cost in costs])
            if total - price_s > most or price_s <= cheap_s:
                best, most = count, total - price_s
        return free + [sid for *_, sid in gains[:best]]

    def guessed(self, name: str, drafts: Sequence[SessionDraft], seconds: float) -> None:
        """The trees that asking a drafter gave, and how long it took for all sessions together."""
        levels = []
        for draft in drafts:
            levels.append(max(depths(parents_of(draft)), default=0))
            asked = self._sessions[draft.session_id].asked.get(name)
            if asked is not None:
                asked.guesses = first_tokens([draft])
        self._timed(name, drafts, levels, seconds)

    def least_survival(
        self, name: str, session_id: int, continued: bool, together: int = 1, asking: int = 1
    ) -> float:
        """How likely a token of a session's tree must be accepted for drafter `name` to draft another below
        it. `continued`: somebody else guesses there for nothing. `together`: sessions that wait while it
        drafts, for `asking` of them."""
        least = self._sessions[session_id].target.price(name, together, asking)
        least /= _LIKELY_BELOW_OTHERS if continued else _LIKELY_BELOW
        return min(_ALMOST_SURE, least)  # whoever is asked drafts a token

    def _timed(
        self, name: str, drafts: Sequence[SessionDraft], lengths: Sequence[int], seconds: float
    ) -> None:
        sessions = [self._sessions[draft.session_id] for draft in drafts]
        if any(lengths):
            # Exits that are drafted at together take what the deepest takes.
            exit_depth = max(draft.exit_depth or 0 for draft in drafts)
            cost = self._costs.setdefault((name, exit_depth), _Cost())
            much_to_read = any(session.told.get(name, _MUCH) >= _MUCH for session in sessions)
            cost.observe(seconds, lengths, at_most=much_to_read)
            by_target: dict[_Target, list[int]] = {}
            for session, length in zip(sessions, lengths, strict=True):
                by_target.setdefault(session.target, []).append(length)
            for target, own in by_target.items():
                target.record(name).drafted(cost, own)
        for session in sessions:
            session.told[name] = 0

    @staticmethod
    def _expected(session: _Session, name: str, length: int) -> float:
        """Tokens of a draft of that length that can be expected to be accepted, by what became of others."""
        return sum(session.target.model.survival(session.acceptance, name, length))
