"""How many draft tokens each request gets, every round: the ones that pay, by measurement.

Expected tokens per second of a round with draft positions D over R requests is
    (R + sum of survival over D) / (cost(rows + |D|) + wait),
maximised greedily: positions are admitted across requests in order of their survival probability while the
ratio grows (goodput as in TurboSpec, arXiv 2406.14066; one budget over requests as in AdaServe, 2501.12162).
Zero is always among the choices. The decision is made twice: before asking (is a draft worth waiting for?)
and after the drafts came (the wait is spent; which positions are worth verifying?). What it brought is booked
(`DraftAccount`); while drafting is in debt nobody is asked.

Rounds that also compute prompts take long, and time is as dear in them as in others: the requests whose
prompts these are wait too. They count among R, and what their prompts take is left out of the cost; else
a round that is long anyway would make any guess worth its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from actors.costs import CostModel
from actors.drafting.acceptance_model import AcceptanceModel, RequestAcceptance
from actors.drafting.interface import SessionDraft
from actors.engine.account import BATCH_SHARE, DraftAccount
from actors.engine.waits import DraftWaits, RoundOverhead

_FIRST_PROBE, _LAST_PROBE = 4, 64
_PROBE_LENGTHS = (2, 4, 8)
"""In turn: what rounds of more rows cost must stay known too."""
_LOOK_INTERVAL, _LONGEST_LOOK = 4, 16
"""Rounds between two looks at whether drafting pays, while it does not: so many a request, up to the second
number, as a look takes longer the more there are."""
_MIN_GAIN = 1.01
"""Drafting must promise this much over not drafting. Estimates may promise what is not there; the account
bounds what that costs. More caution gives away what drafting brings (replayed: docs/methods/router.md)."""

_PROBE_SHARE = BATCH_SHARE
"""Share of the time that a batch waits for probes, as all wait for what may help one, but not more than once
in 4 rounds a request, nor less than once in 64."""
_PATIENCE = 4.0
"""Times the interval that probes keep back while prompts are computed."""
_FEW_SEEN = 4
"""Drafts until which those of a batch ask one after the other."""
_SELDOM = 8
"""Rounds without asking after which a request's drafter has more to read than a draft takes."""
_PAID_OFF_IN = 16
"""Rounds in which drafting must make up for what has to be read before it."""
_VERIFIED_IN_BATCH = 4
"""One in so many probes of a batch is verified: all wait for its rows, and rounds differ in rows anyway."""
_FURTHER_INTERVAL = 32
"""Rounds with drafts of which one verifies more than pays."""
_IN_DEBT = "plain decoding: drafting has to make up for what it lost"


@dataclass(slots=True)
class ControlState:
    """The controller's memory of one request."""

    acceptance: RequestAcceptance = field(default_factory=RequestAcceptance)
    rounds_since_asked: int = 0
    probe_interval: int = _FIRST_PROBE
    probing: bool = False
    """Whether the drafts now under way were asked for as a probe."""
    asked: bool = False
    """Whether it ever asked for drafts."""

    @property
    def overdue(self) -> float:
        """Time since drafts were asked for, in intervals between probes."""
        return self.rounds_since_asked / self.probe_interval

    def rounds_until(self, overdue: float) -> int:
        """Rounds until it is overdue by so much; none or less where it is already."""
        return math.ceil(overdue * self.probe_interval) - self.rounds_since_asked


@dataclass(frozen=True, slots=True)
class Candidate:
    """One request that may draft: at most `limit` tokens, by `drafters`; `forced` bypasses the decision. With
    `tree` its proposals are trees, recorded under the name of the first drafter. `context`: KV entries that
    its rows attend to."""

    state: ControlState
    limit: int
    drafters: tuple[str, ...]
    forced: bool = False
    tree: bool = False
    context: int = 0


class Controller:
    """Chooses draft lengths. `plan` before asking, `trim` once drafts are there."""

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self.reads_in_rounds = False
        """Whether a model in this process drafts: it reads what came since it was asked while the round
        waits. A draft worker does so in between."""
        self.acceptance = AcceptanceModel()
        self.account = DraftAccount()
        self._waits = DraftWaits()
        self._overhead = RoundOverhead()
        self._last_wait_s = 0.0
        self._plain_s = 0.0
        self._attention_s = 0.0
        self._waiting, self._joining, self._beside = 1, 0, 0
        """Requests that the round keeps waiting, those of them whose prompts are computed, and those that
        decode and never draft."""
        self._rounds_to_look = 0
        self._rounds_to_probe = 0
        self._probes = self._verified = self._drafting_rounds = 0
        self._drafts_seen = 0
        self._hoping = False
        """Whether drafts are asked for to learn whether they are right at all."""
        self._longest = 1
        """Tokens that the longest of the drafts now under way may have."""
        self._catching_up = False
        """Whether somebody's drafter has to, for these drafts."""
        self._reason = "nothing decided yet"
        self._decisions = {"asked": 0, "declined": 0, "probes": 0}

    def reset(self) -> None:
        self.acceptance.reset()
        self.account.reset()
        self._rounds_to_look = self._rounds_to_probe = self._drafts_seen = 0

    def observe_wait(self, seconds: float, asking: int = 1) -> None:
        """Time the engine stood still for the drafts of `asking` requests in one round."""
        self._last_wait_s = seconds + asking * self._overhead.asking_s
        self._waits.observe(seconds, asking, self._longest, catching_up=self._catching_up)

    def observe_overhead(self, seconds: float, requests: int, asking: int) -> None:
        """What a round of so many requests, `asking` of which asked for drafts, took beside drafts and the
        target's pass."""
        self._overhead.observe(seconds, requests, asking)

    def adopt(self, drafter: str, exit_depth: int) -> None:
        """`drafter` drafts at another exit from now on; whether that pays is looked at in the next round."""
        self.acceptance.adopt(drafter, exit_depth)
        self._rounds_to_look = 0

    def observe_accepted(self, accepted: int) -> None:
        """Draft tokens of one request, not forced, that the round which `trim` planned brought."""
        self.account.earn(accepted, self._plain_s, self._waiting)

    def plan(
        self,
        candidates: Sequence[Candidate],
        other_rows: int = 0,
        joining: int = 0,
        plain: Sequence[int] = (),
    ) -> list[int]:
        """Draft tokens to ask for, per candidate. `other_rows` share the round: of the prompts of `joining`
        requests. `plain`: KV entries of those that decode in it and never draft; they wait too."""
        if not candidates:
            return []
        budgets = [c.limit if c.forced else 0 for c in candidates]
        probes: set[int] = set()
        contexts = [*(c.context for c in candidates), *plain]
        sequences = len(contexts)
        self._attention_s = sum(self.costs.attention_s(context, 1, sequences) for context in contexts)
        self._waiting, self._joining, self._beside = sequences + joining, joining, len(plain)
        plain_s = self.costs.seconds(self._waiting) + self._attention_s
        self.account.round(plain_s, self._waiting)
        if self.account.solvent:
            probes = self._plan_free(candidates, budgets, other_rows)
        else:
            self._reason = _IN_DEBT
        asking = [c.state for c, budget in zip(candidates, budgets, strict=True) if budget]
        self._catching_up = any(self._catches_up(state) for state in asking)
        self._longest = max(budgets)
        for index, (candidate, budget) in enumerate(zip(candidates, budgets, strict=True)):
            self._remember(candidate.state, budget, index in probes)
        return budgets

    def _catches_up(self, state: ControlState) -> bool:
        """Whether the round waits longer for this request's draft than when it asks again and again."""
        return not state.asked or (self.reads_in_rounds and state.rounds_since_asked > _SELDOM)

    def rests(self, states: Sequence[ControlState], other_rows: int = 0, beside: int = 0) -> int:
        """Coming rounds of some requests, none of which is forced, in which nothing is to be decided: nobody
        asks in them, and no candidates have to be made. `beside`: requests that decode with them and never
        draft. Tell how many passed with `rested`."""
        self._beside = beside
        if not self.account.solvent:
            self._reason = _IN_DEBT
            return _LOOK_INTERVAL
        self._bound_pauses(len(states) + self._beside)
        rounds = min(_LOOK_INTERVAL, self._rounds_to_look)
        for state in states:
            to_probe = state.rounds_until(_due_at(other_rows))
            rounds = min(rounds, max(to_probe, self._rounds_to_probe - 1))
        return max(0, rounds)

    def rested(self, states: Sequence[ControlState], rounds: int) -> None:
        """Count rounds of these requests in which nobody asked, as `plan` would have."""
        if self.account.solvent:
            self._rounds_to_look -= rounds
            self._rounds_to_probe -= rounds
        requests = len(states) + self._beside
        plain_s = self.costs.seconds(requests) + self._attention_s
        self.account.round(plain_s, requests, rounds)
        for state in states:
            state.rounds_since_asked += rounds
        self._decisions["declined"] += rounds * len(states)

    def _bound_pauses(self, requests: int) -> None:
        """What is left of the pauses of a batch that was larger is too long."""
        self._rounds_to_look = min(self._rounds_to_look, self._look_pause(requests))
        self._rounds_to_probe = min(self._rounds_to_probe, self._probe_pause(requests))

    @staticmethod
    def _look_pause(requests: int) -> int:
        return min(_LONGEST_LOOK, _LOOK_INTERVAL * requests) - 1

    def _plan_free(self, candidates: Sequence[Candidate], budgets: list[int], other_rows: int) -> set[int]:
        """Sets the budgets of the requests that leave them to the controller; returns which are probes."""
        free = [(i, c) for i, c in enumerate(candidates) if not c.forced and c.limit > 0]
        forced = any(budgets)
        if not free:
            # Nothing was decided: a request's last round must not keep the next one from being looked at.
            self._reason = self._explain(0.0, 0.0, 0)
            return set()
        decoding = self._waiting - self._joining
        self._bound_pauses(decoding)
        self._rounds_to_probe -= 1
        due = self._most_overdue(free, _due_at(other_rows)) if self._rounds_to_probe <= 0 else None
        if self._rounds_to_look > 0 and due is None and not forced:
            self._rounds_to_look -= 1
            return set()
        base = decoding + sum(budgets)
        lengths, gain, wait = self._worth_asking([c for _, c in free], base, other_rows, forced)
        pays = any(lengths)
        self._rounds_to_look = 0 if pays else self._look_pause(decoding)
        self._reason = self._explain(gain, wait, len(free))
        hoping = pays and not forced and self._drafts_seen < _FEW_SEEN
        self._hoping = hoping and len(free) > 1
        if hoping and self._waiting > 1:
            # Nothing but hope speaks for it: one a round is enough to learn, and all wait for as many as ask,
            # also those whose prompts are computed. The same one each time: a drafter reads a prompt when it
            # is first asked, which takes longer than a draft.
            lengths, pays = [0] * len(free), False
            if other_rows:
                due = self._most_overdue(free, _due_at(other_rows))
            else:
                due = min(free, key=lambda entry: entry[1].state.rounds_since_asked)[0]
        elif due is not None:
            self._rounds_to_probe = self._probe_pause(decoding)
        probes: set[int] = set()
        for (index, candidate), length in zip(free, lengths, strict=True):
            # Where all wait anyway, probes that are due soon come along.
            soon = (pays or forced) and candidate.state.overdue >= 0.5
            if length == 0 and (soon or index == due):
                probes.add(index)
            if index in probes and not pays:
                budgets[index] = candidate.limit
            elif length > 0 or index in probes:
                length = length or max(lengths)
                budgets[index] = self._asked_for(candidate, length, alone=self._waiting == 1)
        return probes

    def _worth_asking(
        self, free: Sequence[Candidate], base: int, other_rows: int, forced: bool
    ) -> tuple[list[int], float, float]:
        """Lengths that pay, the gain that they promise and the wait that this takes into account."""
        requests = self._waiting
        curves, contexts = [self._expected(c) for c in free], [c.context for c in free]
        beside_s = len(free) * self._overhead.asking_s
        if self.reads_in_rounds and requests > 1:
            to_read = sum(self._catches_up(c.state) for c in free)
            beside_s += to_read * self._waits.seldom / _PAID_OFF_IN

        def admitted(most: int, wait_of: Callable[[int, int], float]) -> tuple[list[int], float, float]:
            wait = 0.0 if forced else wait_of(len(free), most) + beside_s
            cut = [curve[:most] for curve in curves]
            return (*self._admit(cut, contexts, base, other_rows, wait), wait)

        most = max(c.limit for c in free)
        found = admitted(most, self._waits.expected)
        chains_of_a_batch = requests > 1 and not any(c.tree for c in free)
        if chains_of_a_batch:
            # All wait for the longest draft: shorter ones may bring more.
            for shorter in range(max(1, max(found[0]) - 1), 0, -1):
                found = max(found, admitted(shorter, self._waits.expected), key=itemgetter(1))
        if not any(found[0]) and self._drafts_seen >= _FEW_SEEN:
            most = 1 if chains_of_a_batch else most
            if self._waits.least(len(free), most) < self._waits.expected(len(free), most):
                # So many have not asked together yet, and may wait no longer than fewer did: it is tried.
                found = admitted(most, self._waits.least)
        return found

    @staticmethod
    def _asked_for(candidate: Candidate, length: int, *, alone: bool) -> int:
        """Tokens to ask for where `length` are expected to pay. A request that is alone asks for all it may
        get, and `trim` decides; of a batch all would wait for the longest draft. A tree's tokens stand side
        by side."""
        return candidate.limit if alone or candidate.tree else length

    def _expected(self, candidate: Candidate) -> list[float]:
        """P(accepted) by place of what a candidate would be given."""
        request = candidate.state.acceptance
        if candidate.tree:
            return self.acceptance.expected_tree_survival(request, candidate.drafters[0], candidate.limit)
        return self.acceptance.expected_survival(request, candidate.drafters, candidate.limit)

    def _survival(self, candidate: Candidate, draft: SessionDraft, drafted: int) -> list[float]:
        """P(accepted) by place of a draft that came. Of one that was drawn from a q, by place of the longest
        that could have come: how far it goes says what was drawn (a stop id, a token that is unlikely or that
        the grammar forbids), and what was drawn must not decide whether it is judged."""
        length = candidate.limit if draft.q else min(drafted, candidate.limit)
        request = candidate.state.acceptance
        if candidate.tree:
            return self.acceptance.tree_survival(request, draft, candidate.drafters[0])[:length]
        return self.acceptance.survival(request, draft.drafter, length)

    def trim(
        self, drafts: Sequence[tuple[Candidate, SessionDraft, int]], base_rows: int, emitting: int
    ) -> list[int]:
        """Lengths to verify of drafts that came: (candidate, draft, tokens of it that may be verified), with
        the tokens that were asked for as the candidate's limit. `base_rows` are in the round anyway, and
        `emitting` requests emit a token in it anyway."""
        lengths = [drafted if c.forced else 0 for c, _, drafted in drafts]
        free = [(i, d) for i, d in enumerate(drafts) if not d[0].forced]
        self._drafts_seen += len(free)
        curves = [self._survival(*entry) for _, entry in free]
        contexts = [candidate.context for _, (candidate, _, _) in free]
        if self._hoping:  # verified or not, they are scored
            curves = [[] for _ in free]
        self._waiting = emitting + self._joining
        chosen, _ = self._admit(curves, contexts, emitting + sum(lengths), base_rows - emitting, 0.0)
        probed = any(chosen)
        for (index, (candidate, _, _)), curve, length in zip(free, curves, chosen, strict=True):
            state = candidate.state
            if length > 0:
                state.probe_interval = _FIRST_PROBE
            elif state.probing and not probed:
                # One probe a round may be verified, a little of it: the costs of such rounds must stay known.
                # The others are scored against what the target emits, which costs nothing.
                if self._probes % (1 if emitting == 1 else _VERIFIED_IN_BATCH) == 0:
                    length = min(_PROBE_LENGTHS[self._verified % len(_PROBE_LENGTHS)], len(curve))
                    self._verified += 1
                self._probes += 1
                probed = True
            lengths[index] = length
            state.probing = False
        if any(chosen) and base_rows == emitting:  # rounds with prompts say nothing of costs
            self._look_further([index for index, _ in free], curves, lengths)
        lengths = [min(length, drafted) for length, (_, _, drafted) in zip(lengths, drafts, strict=True)]
        self._plain_s = self.costs.seconds(self._waiting) + self._attention_s
        # What is forced would be waited for and verified anyway.
        forced_rows = sum(lengths) - sum(lengths[index] for index, _ in free)
        extra_s = 0.0 if forced_rows else self._last_wait_s
        extra_s += self.costs.seconds(base_rows + sum(lengths)) - self.costs.seconds(base_rows + forced_rows)
        for index, (candidate, _, _) in free:
            extra_s += lengths[index] * self.costs.drafted_attention_s(candidate.context)
        self.account.spend(extra_s)
        return lengths

    def _look_further(
        self, free: Sequence[int], curves: Sequence[Sequence[float]], lengths: list[int]
    ) -> None:
        """Now and then verify twice as much of a draft as pays: rounds of so many rows never come otherwise
        once they seem too dear, and nothing would show that they are not."""
        self._drafting_rounds += 1
        left = {
            index: len(curve) - lengths[index]
            for index, curve in zip(free, curves, strict=True)
            if len(curve) > lengths[index] > 0
        }
        if self._drafting_rounds < _FURTHER_INTERVAL or not left:
            return
        self._drafting_rounds = 0
        index = max(left, key=left.__getitem__)
        lengths[index] += min(left[index], lengths[index])

    def _admit(
        self,
        curves: Sequence[Sequence[float]],
        contexts: Sequence[int],
        base_rows: int,
        other_rows: int,
        wait_s: float,
    ) -> tuple[list[int], float]:
        """Greedy admission of positions; returns a length per curve and the predicted gain over none.
        `other_rows` beside `base_rows` are of prompts."""
        seconds_of = self.costs.seconds
        attention_s, waiting = self._attention_s, self._waiting
        rows, without = base_rows + other_rows, base_rows + self._joining
        prompts_s = seconds_of(rows) - seconds_of(without)
        baseline = waiting / max(seconds_of(without) + attention_s, 1e-9)
        positions = sorted(
            (-value, place, index) for index, curve in enumerate(curves) for place, value in enumerate(curve)
        )
        row_attention_s = [self.costs.drafted_attention_s(context) for context in contexts]
        expected, best, admitted = float(waiting), baseline * _MIN_GAIN, 0
        for count, (minus_value, _, index) in enumerate(positions, start=1):
            expected -= minus_value
            attention_s += row_attention_s[index]
            rate = expected / (seconds_of(rows + count) - prompts_s + attention_s + wait_s or 1e-9)
            if rate > best:
                best, admitted = rate, count
        lengths = [0] * len(curves)
        for _, _, index in positions[:admitted]:
            lengths[index] += 1
        return lengths, best / baseline - 1.0 if admitted else 0.0

    @staticmethod
    def _most_overdue(free: Sequence[tuple[int, Candidate]], least: float) -> int | None:
        """The index of whoever has not asked for longest, in intervals between probes, but for `least`."""
        due = [(c.state.overdue, -i) for i, c in free if c.state.overdue >= least]
        return -max(due)[1] if due else None

    def _probe_pause(self, requests: int) -> int:
        """Rounds until another request of a batch may probe. One that is alone waits for nobody else."""
        if requests == 1:
            return _FIRST_PROBE
        plain_s = self.costs.seconds(requests) + self._attention_s
        affordable = (self._waits.seldom + self._overhead.asking_s) / max(_PROBE_SHARE * plain_s, 1e-9)
        return min(_LAST_PROBE, max(_FIRST_PROBE * requests, math.ceil(affordable)))

    def _remember(self, state: ControlState, budget: int, probing: bool) -> None:
        state.probing = probing
        if budget == 0:
            state.rounds_since_asked += 1
            self._decisions["declined"] += 1
            return
        if probing:
            # Until a probe's drafts turn out worth verifying (`trim`), the next one waits longer.
            state.probe_interval = min(_LAST_PROBE, state.probe_interval * 2)
            self._decisions["probes"] += 1
        state.rounds_since_asked = 0
        state.asked = True
        self._decisions["asked"] += 1

    def _explain(self, gain: float, wait_s: float, free: int) -> str:
        if free == 0:
            return "no request leaves the draft length to the controller"
        verdict = "drafting" if gain > 0 else "plain decoding"
        return f"{verdict}: predicted gain {100 * gain:+.1f} % at a wait of {1e3 * wait_s:.2f} ms for drafts"

    def table(self, drafters: Iterable[str]) -> dict[str, object]:
        """What the controller knows and why it last chose what it chose."""
        known = self.acceptance.table()
        return {
            "reason": self._reason,
            "cost_ms_by_rows": self.costs.table(),
            "cost_us_by_kv_entry": self.costs.attention_table(),
            "balance_ms": round(self.account.balance_s * 1e3, 3),
            "wait_ms": round(self._waits.mean_s * 1e3, 3),
            "wait_ms_by_requests": self._waits.table(),
            "overhead_ms_by_request": round(self._overhead.asking_s * 1e3, 3),
            "acceptance": {name: known.get(name, []) for name in drafters},
            "decisions": dict(self._decisions),
        }


def _due_at(other_rows: int) -> float:
    """When a probe is due, in its intervals: later while prompts are computed, as first tokens would wait."""
    return _PATIENCE if other_rows else 1.0
