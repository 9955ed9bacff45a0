"""Draft lengths: what pays is admitted, what does not is switched off, and what is off can come back."""

from __future__ import annotations

import random
from unittest import mock

import pytest

from actors.costs import CostModel
from actors.drafting.interface import SessionDraft
from actors.engine.account import BATCH_SHARE, LIMIT_ROUNDS, SHARE, DraftAccount
from actors.engine.controller import Candidate, Controller, ControlState
from actors.engine.waits import DraftWaits, RoundOverhead

DRAFT = SessionDraft(1, 1, (1, 2, 3, 4), drafter="d")


def _controller(first_row: float = 10.0, per_row: float = 0.5, wait: float = 0.5) -> Controller:
    costs = CostModel()
    for rows in (1, 2, 4, 8, 16, 32):
        costs.observe(rows, (first_row + per_row * rows) / 1e3)
    controller = Controller(costs)
    for _ in range(100):
        controller.observe_wait(wait / 1e3)
    return controller


def _teach(controller: Controller, state: ControlState, accepted: int, times: int = 40) -> None:
    """Propose four tokens `times` times; the first `accepted` are right."""
    for _ in range(times):
        controller.acceptance.proposed(
            state.acceptance, SessionDraft(1, 1, (1, 2, 3, 4), drafter="d"), ("d",)
        )
        emitted = [*[1, 2, 3, 4][:accepted], 9]
        controller.acceptance.emitted(state.acceptance, emitted)


def test_good_drafts_are_used_in_full_and_bad_ones_not_at_all() -> None:
    for accepted, expected in ((4, 4), (0, 0)):
        controller, state = _controller(), ControlState()
        _teach(controller, state, accepted)
        candidate = Candidate(state, 4, ("d",))
        assert controller.trim([(candidate, DRAFT, 4)], base_rows=1, emitting=1) == [expected]


def test_partly_right_drafts_are_cut_where_they_stop_paying() -> None:
    controller, state = _controller(), ControlState()
    _teach(controller, state, accepted=2, times=80)
    assert controller.trim([(Candidate(state, 4, ("d",)), DRAFT, 4)], 1, 1) == [2]


def test_rows_as_dear_as_the_round_switch_drafting_off() -> None:
    controller, state = _controller(first_row=0.1, per_row=10.0), ControlState()
    _teach(controller, state, accepted=4)
    # Each extra row costs a whole round and survives with probability below one: nothing is gained.
    assert controller.trim([(Candidate(state, 4, ("d",)), DRAFT, 4)], 1, 1) == [0]


def test_a_drafter_that_never_answers_is_not_waited_for() -> None:
    controller, state = _controller(wait=5.0), ControlState()
    for _ in range(60):
        controller.acceptance.proposed(state.acceptance, None, ("d",))
    asked = [controller.plan([Candidate(state, 4, ("d",))])[0] > 0 for _ in range(200)]
    assert 0 < sum(asked) < 12, "only probes, and ever fewer of them"


def test_a_new_request_begins_with_how_often_there_was_a_guess() -> None:
    """Of a batch each request is seldom asked for: it would end before it had shown that drafters answer."""
    controller = _controller()
    for _ in range(30):
        _teach(controller, ControlState(), accepted=1, times=2)
    fresh = controller.acceptance.expected_survival(ControlState().acceptance, ("d",), 1)
    assert fresh[0] == pytest.approx(0.95, abs=0.05)
    for _ in range(400):
        controller.acceptance.proposed(ControlState().acceptance, None, ("d",))
    assert controller.acceptance.expected_survival(ControlState().acceptance, ("d",), 1)[0] < 0.2
    controller.acceptance.reset()
    assert controller.acceptance.expected_survival(ControlState().acceptance, ("d",), 1) == [0.25]


def test_shadow_scoring_brings_a_drafter_back() -> None:
    controller, state = _controller(), ControlState()
    candidate = Candidate(state, 4, ("d",))
    _teach(controller, state, accepted=0)
    assert controller.trim([(candidate, DRAFT, 4)], 1, 1) == [0]
    # Not verified, but scored against what the target emits one token at a time.
    for _ in range(30):
        controller.acceptance.proposed(
            state.acceptance, SessionDraft(1, 1, (1, 2, 3, 4), drafter="d"), ("d",)
        )
        for token in (1, 2, 3, 4):
            controller.acceptance.emitted(state.acceptance, [token])
    assert controller.trim([(candidate, DRAFT, 4)], 1, 1) == [4]


def test_forced_lengths_bypass_the_decision() -> None:
    controller, state = _controller(per_row=100.0), ControlState()
    _teach(controller, state, accepted=0)
    forced = Candidate(state, 3, ("d",), forced=True)
    assert controller.plan([forced]) == [3]
    assert controller.trim([(forced, DRAFT, 3)], 1, 1) == [3]


def test_another_exit_is_judged_by_what_is_known_of_it() -> None:
    controller, state = _controller(), ControlState()
    _teach(controller, state, accepted=0)
    for _ in range(40):
        for place in range(3):
            controller.acceptance.observe_exit(8, place, True)
    known = controller.acceptance.survival(state.acceptance, "d", 3)
    assert known[0] < 0.1
    controller.adopt("d", 8)
    fresh = ControlState()
    assert controller.acceptance.survival(fresh.acceptance, "d", 3)[2] > 0.8
    controller.acceptance.observe_exit(8, 0, False)
    assert controller.acceptance.survival(fresh.acceptance, "d", 1)[0] > 0.95, "a copy"
    controller.adopt("d", 4)  # nothing is known of it
    assert controller.acceptance.survival(fresh.acceptance, "d", 1) == [0.5]


def test_one_budget_over_the_batch_prefers_the_better_draft() -> None:
    controller = _controller(first_row=10.0, per_row=4.0)
    good, bad = ControlState(), ControlState()
    _teach(controller, bad, accepted=0)
    _teach(controller, good, accepted=4)
    lengths = controller.trim(
        [(Candidate(bad, 4, ("d",)), DRAFT, 4), (Candidate(good, 4, ("d",)), DRAFT, 4)], 2, 2
    )
    assert lengths[1] > 0
    assert lengths[0] == 0


@pytest.mark.parametrize("joining", [0, 1, 15])
def test_a_round_that_is_long_for_prompts_makes_no_guess_worth_its_rows(joining: int) -> None:
    """Whose prompts are computed wait too: what rows cost is weighed as in rounds without prompts."""

    def verified(wrong: int, rows: int, joining: int) -> int:
        controller, state = _controller(first_row=5.0, per_row=1.0, wait=0.1), ControlState()
        for _ in range(60):
            _teach(controller, state, accepted=0, times=wrong)
            _teach(controller, state, accepted=4, times=1)
        candidate = Candidate(state, 4, ("d",))
        controller.plan([candidate], rows, joining)
        return controller.trim([(candidate, DRAFT, 4)], 1 + rows, 1)[0]

    rows = 128 if joining else 0
    assert verified(9, rows, joining) == 0, "right one time in ten, and a row is a hundredth of the round"
    assert verified(0, rows, joining) == 4, "always right"
    controller, state = _controller(first_row=5.0, per_row=1.0, wait=0.1), ControlState()
    _teach(controller, state, accepted=4)
    controller.plan([Candidate(state, 4, ("d",))], rows, joining)
    before = controller.account.balance_s
    controller.trim([(Candidate(state, 4, ("d",)), DRAFT, 4)], 1 + rows, 1)
    controller.observe_accepted(1)
    waiting = 1 + joining
    earned = controller.costs.seconds(waiting) / waiting
    spent = controller.costs.seconds(rows + 5) - controller.costs.seconds(rows + 1) + 0.1e-3
    assert controller.account.balance_s == pytest.approx(before + earned - spent, rel=0.05)


def test_a_probe_is_verified_a_little() -> None:
    controller, state = _controller(first_row=0.1, per_row=10.0), ControlState()
    _teach(controller, state, accepted=0)
    candidate = Candidate(state, 4, ("d",))
    verified = []
    for _ in range(40):
        asked = controller.plan([candidate])[0]
        verified.append(controller.trim([(candidate, DRAFT, 4)], 1, 1)[0] if asked else 0)
    assert 0 < sum(v > 0 for v in verified) < 8
    assert {v for v in verified if v} == {2, 4}, "of any length: rounds of more rows must be measured too"


@pytest.mark.parametrize("forced", [0, 1])
def test_drafting_that_never_pays_costs_a_bounded_share_whatever_the_estimates_say(forced: int) -> None:
    """The drafts look good (they are scored as right elsewhere), but bring nothing in these rounds. Beside a
    request whose drafts are forced only the rows are lost, as all wait for these anyway."""
    controller, state = _controller(first_row=10.0, per_row=0.5, wait=2.0), ControlState()
    _teach(controller, state, accepted=4)
    candidate = Candidate(state, 4, ("d",))
    beside = [Candidate(ControlState(), 4, ("d",), forced=True)] * forced
    rounds, lost, requests = 2000, 0.0, 1 + forced
    for _ in range(rounds):
        budgets = controller.plan([candidate, *beside])
        if any(budgets):
            controller.observe_wait(2e-3)
            asking = [c for c, budget in zip([candidate, *beside], budgets, strict=True) if budget]
            lengths = controller.trim([(c, DRAFT, 4) for c in asking], requests, requests)
            controller.observe_accepted(0)
            length = lengths[0] if budgets[0] else 0
            rows = requests + 4 * forced
            lost += controller.costs.seconds(rows + length) - controller.costs.seconds(rows)
            lost += 0.0 if forced else 2e-3
    assert 0.0 < lost < 0.015 * rounds * controller.costs.seconds(requests)


def test_drafting_that_pays_goes_on() -> None:
    controller, state = _controller(first_row=10.0, per_row=0.5, wait=2.0), ControlState()
    _teach(controller, state, accepted=4)
    candidate = Candidate(state, 4, ("d",))
    for _ in range(200):
        assert controller.plan([candidate]) == [4]
        controller.observe_wait(2e-3)
        assert controller.trim([(candidate, DRAFT, 4)], 1, 1) == [4]
        controller.observe_accepted(1)


def test_waits_are_known_by_how_many_ask() -> None:
    waits = DraftWaits()
    assert waits.mean_s == 0.0
    assert waits.expected(4) == pytest.approx(4 * waits.expected(1))
    for _ in range(60):
        waits.observe(1.5e-3, 1)
    assert waits.expected(1) == pytest.approx(1.5e-3, rel=0.02)
    assert waits.expected(4) == pytest.approx(6e-3, rel=0.02), "more wait longer in proportion, at most"
    for _ in range(60):
        waits.observe(2e-3, 4)
    assert waits.expected(4) == pytest.approx(2e-3, rel=0.02)
    assert waits.expected(3) == waits.expected(4), "fewer do not wait longer"
    assert waits.expected(1) == pytest.approx(1.5e-3, rel=0.02)
    assert set(waits.table()) == {"1", "4"}


def test_what_counts_is_the_mean_of_short_and_long_waits() -> None:
    waits = DraftWaits()
    for seconds in (2e-3, 10e-3) * 60:
        waits.observe(seconds, 8)
    assert waits.expected(8) == pytest.approx(6e-3, rel=0.15)
    waits.observe(0.1, 8)
    assert waits.expected(8) < 9e-3, "a stray one"


@pytest.mark.parametrize(("requests", "asked"), [(1, 4), (4, 0)])
def test_drafts_that_are_worth_their_wait_for_one_request_need_not_be_for_four(
    requests: int, asked: int
) -> None:
    controller = _controller(first_row=8.0, per_row=0.5, wait=1.5)
    states = [ControlState() for _ in range(requests)]
    for state in states:
        _teach(controller, state, accepted=1)
    for _ in range(60):
        controller.observe_wait(12e-3, 4)
    assert controller.plan([Candidate(state, 4, ("d",)) for state in states]) == [asked] * requests


@pytest.mark.parametrize(("added_ms", "asked"), [(0.1, 4), (2.5, 0)])
def test_drafts_must_pay_for_their_books_too(added_ms: float, asked: int) -> None:
    controller, state = _controller(first_row=8.0, per_row=0.5, wait=7.0), ControlState()
    _teach(controller, state, accepted=1)
    for _ in range(10):
        controller.observe_overhead(1e-3, 1, 0)
    for _ in range(300):
        controller.observe_overhead(1e-3 + added_ms / 1e3, 1, 1)
    shown = controller.table(())["overhead_ms_by_request"]
    assert shown == pytest.approx(min(added_ms, 1.0), rel=0.02), "strays count as no more than 1 ms"
    assert controller.plan([Candidate(state, 4, ("d",))]) == [asked]


def test_overhead_is_what_those_add_who_ask() -> None:
    overhead = RoundOverhead()
    overhead.observe(2e-3, 4, 2)
    assert overhead.asking_s == 0.0, "not known without rounds in which nobody asks"
    for _ in range(200):
        overhead.observe(0.4e-3, 4, 0)
        overhead.observe(0.2e-3, 1, 0)
        overhead.observe(0.8e-3, 4, 2)
        overhead.observe(0.4e-3, 1, 1)
    assert overhead.asking_s == pytest.approx(0.2e-3, rel=0.02)
    for _ in range(200):
        overhead.observe(0.1e-3, 3, 3)
    assert overhead.asking_s < 0.01e-3, "nothing is added, and never less than that"


def test_noise_adds_nothing_to_what_those_add_who_ask() -> None:
    overhead, rng = RoundOverhead(), random.Random(0)
    for number in range(4000):
        overhead.observe(1e-3 + rng.gauss(0.0, 0.15e-3), 1, number % 2)
    assert overhead.asking_s < 0.03e-3


def test_many_requests_start_with_less_credit() -> None:
    one, many = DraftAccount(), DraftAccount()
    one.round(0.01)
    many.round(0.01, requests=6)
    assert many.balance_s == pytest.approx(one.balance_s / 6, rel=0.05)
    for _ in range(3000):
        one.round(0.01)
        many.round(0.01, requests=6)
    assert many.balance_s == pytest.approx(one.balance_s)


def test_a_wait_that_brought_no_draft_is_paid_for() -> None:
    controller = _controller()
    controller.plan([Candidate(ControlState(), 4, ("d",))])
    before = controller.account.balance_s
    controller.observe_wait(15e-3)
    assert controller.trim([], 1, 1) == []
    assert before - controller.account.balance_s == pytest.approx(15e-3)


def test_bad_luck_does_not_put_drafting_that_pays_in_debt() -> None:
    """Two tokens with chances of 0.55 and 0.26, for 0.6 of a round: a gain of a sixth, as was recorded."""
    account, rng, indebted = DraftAccount(), random.Random(0), 0
    for _ in range(5000):
        account.round(0.006)
        if not account.solvent:
            indebted += 1
            continue
        account.spend(0.6 * 0.006)
        luck = rng.random()
        account.earn((luck < 0.55) + (luck < 0.26), 0.006, 1)
    assert indebted < 1500


def test_what_does_not_pay_costs_its_share_and_what_was_saved_up() -> None:
    account, spent = DraftAccount(), 0.0
    for _ in range(1000):
        account.round(0.01)  # all that can be saved up
    for _ in range(1000):
        account.round(0.01)
        if account.solvent:
            account.spend(0.006)
            spent += 0.006
    assert spent <= (LIMIT_ROUNDS + 1 + SHARE * 1000) * 0.01


def test_prompts_do_not_wait_for_drafts_of_which_nothing_is_known() -> None:
    """A request that decodes while the prompts of others are computed: it asks once they are through."""
    controller, alone = _controller(per_row=0.01, wait=0.1), _controller(per_row=0.01, wait=0.1)
    candidate = Candidate(ControlState(), 4, ("d",))
    assert alone.plan([Candidate(ControlState(), 4, ("d",))]) == [4], "nobody else waits"
    for _ in range(6):
        assert controller.plan([candidate], other_rows=128, joining=3) == [0]
    both = [candidate, Candidate(ControlState(), 4, ("d",))]
    assert sum(n > 0 for n in controller.plan(both)) == 1


def test_who_never_drafts_waits_for_the_drafts_of_others_too() -> None:
    """A wait of half a round for one token more: a gain for one request, a loss for nine."""

    def asked(plain: int) -> list[int]:
        controller, state = _controller(first_row=10.0, per_row=0.1, wait=5.0), ControlState()
        _teach(controller, state, accepted=2)
        controller.trim([(Candidate(state, 4, ("d",)), DRAFT, 4)] * 4, 1, 1)
        return controller.plan([Candidate(state, 4, ("d",))], plain=[100] * plain)

    assert asked(plain=0) == [4]
    assert asked(plain=8) == [0]


def test_pauses_are_those_of_all_that_decode_now() -> None:
    """While a batch rests, others that never draft come and go."""
    controller, states = _controller(first_row=0.1, per_row=10.0), [ControlState(), ControlState()]
    candidates = [Candidate(state, 4, ("d",)) for state in states]
    for state in states:
        _teach(controller, state, accepted=0)
    controller.plan(candidates, plain=[100] * 14)
    long = controller._rounds_to_look
    assert controller.rests(states, beside=14) > 0
    assert controller._rounds_to_look == long
    controller.rests(states)
    assert controller._rounds_to_look < long
    before = controller.account.balance_s
    controller.rested(states, 1)
    assert controller.account.balance_s - before == pytest.approx(
        BATCH_SHARE * (controller.costs.seconds(2) + controller._attention_s)
    )


def test_plain_decoding_looks_only_now_and_then() -> None:
    controller, state = _controller(first_row=0.1, per_row=10.0), ControlState()
    _teach(controller, state, accepted=4)
    candidate = Candidate(state, 4, ("d",))
    with mock.patch.object(controller, "_admit", wraps=controller._admit) as admit:
        for _ in range(100):
            controller.plan([candidate])
    assert 0 < admit.call_count < 50


def test_a_round_in_which_nobody_may_draft_does_not_put_off_the_next_look() -> None:
    """The last token of a request needs no draft; the request after it does."""
    controller, state = _controller(), ControlState()
    _teach(controller, state, accepted=4)
    assert controller.plan([Candidate(state, 0, ("d",))]) == [0]
    assert controller.plan([Candidate(state, 4, ("d",))]) == [4]


def test_drafts_of_a_long_sequence_must_promise_more() -> None:
    chosen = {}
    for context in (0, 4000):
        controller, state = _controller(first_row=10.0, per_row=0.5), ControlState()
        controller.costs.profile_attention(lambda rows, context: context * 0.004 * rows / 1e3, 9, (64, 1024))
        for _ in range(20):
            _teach(controller, state, accepted=1, times=1)
            _teach(controller, state, accepted=0, times=1)
        candidate = Candidate(state, 4, ("d",), context=context)
        controller.plan([candidate])
        chosen[context] = controller.trim([(candidate, DRAFT, 4)], 1, 1)[0]
    assert chosen == {0: 1, 4000: 0}


def test_rounds_that_seem_too_dear_are_tried_all_the_same() -> None:
    """A profile said that five rows cost three times what they do: no draft of four would ever show it."""
    costs = CostModel()
    for rows, milliseconds in ((1, 10.2), (2, 10.4), (4, 30.0), (8, 35.0)):
        costs.observe(rows, milliseconds / 1e3)
    controller, state = Controller(costs), ControlState()
    for _ in range(100):
        controller.observe_wait(0.5e-3)
    _teach(controller, state, accepted=4)
    candidate = Candidate(state, 4, ("d",))
    lengths = []
    for _ in range(200):
        assert controller.plan([candidate]) == [4]
        (length,) = controller.trim([(candidate, DRAFT, 4)], 1, 1)
        controller.observe_accepted(length)
        controller.costs.observe(1 + length, (10.0 + 0.2 * (1 + length)) / 1e3)
        lengths.append(length)
    assert max(lengths[:20]) < 4
    assert lengths[-20:].count(4) >= 19


def _length_chosen(
    drawn: int, rounds: int, probing: bool, further: bool, by_q: bool = True
) -> tuple[list[int], list[int]]:
    """Lengths that are verified, round by round, of a draft of which `drawn` tokens may be verified and of
    another request's. All rounds that verify anything cost the same, and more than a token or two bring."""
    costs = CostModel()
    for rows, milliseconds in ((2, 7.4), (3, 13.4), (16, 13.4), (32, 40.0)):
        costs.observe(rows, milliseconds / 1e3)
    controller = Controller(costs)
    tokens = (1,) * max(1, drawn)
    q = (((1, 2), (0.5, 0.5)),) * len(tokens) if by_q else ()
    own = SessionDraft(1, 1, tokens, drafter="d", q=q)
    first, second = ControlState(probing=probing), ControlState()
    if probing:
        _teach(controller, first, accepted=0)
    verified: tuple[list[int], list[int]] = [], []
    for _ in range(rounds):
        drafts = [(Candidate(first, 8, ("d",)), own, drawn), (Candidate(second, 4, ("e",)), DRAFT, 4)]
        first.probing = probing
        if further:
            controller._drafting_rounds = 31
        for lengths, length in zip(verified, controller.trim(drafts, 2, 2), strict=True):
            lengths.append(length)
    return verified


@pytest.mark.parametrize("probing", [False, True])
@pytest.mark.parametrize("further", [False, True])
def test_what_was_drawn_does_not_decide_whether_it_is_judged(probing: bool, further: bool) -> None:
    """How far a draft goes that was drawn from a q says what was drawn: the rule is exact only where each
    place is judged or not whatever was drawn there (arXiv 2211.17192, appendix A.1)."""
    whole, others = _length_chosen(8, 8, probing, further)
    assert any(whole)
    for drawn in range(8):
        own, beside = _length_chosen(drawn, 8, probing, further)
        assert own == [min(length, drawn) for length in whole]
        assert beside == others


def test_a_draft_that_was_not_drawn_is_weighed_as_it_came() -> None:
    assert any(_length_chosen(8, 1, False, False, by_q=False)[0])
    assert not any(_length_chosen(1, 1, False, False, by_q=False)[0])
