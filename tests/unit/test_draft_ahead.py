"""Draft-ahead: what is prepared while a target verifies is what would have been drafted, and only spares
time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.draft_worker.service import AheadPolicy
from actors.drafting.draft_ahead import AheadCounts, AheadDrafter
from actors.drafting.guess_tree import SESSIONS_A_STEP, GuessTree
from actors.drafting.interface import DraftQuery, SessionDraft, SessionOpen
from actors.drafting.nested import NestedDrafter
from actors.drafting.tree import best_chain
from actors.models.cores import Cores, cores_of
from actors.sampling.params import DraftSampling
from protos.s2d.v1 import drafting_pb2 as pb
from tests.unit.test_nested_deferred_kv import EXITS, GREEDY, VOCAB, CheckedDrafter, runner

SAMPLED = DraftSampling(key=77, temperature=0.9, top_k=20)
WITH_Q = replace(SAMPLED, rule="leviathan")


class CountingDrafter(CheckedDrafter):
    """`passes`: how often the model has run since it was last looked at; `asked`: sessions of the last
    call."""

    passes = 0
    asked: Sequence[int] = ()

    def look_ahead(self, queries: Sequence[DraftQuery]) -> list[SessionDraft]:
        self.asked = [query.session_id for query in queries]
        return super().look_ahead(queries)

    def _draft_position(self, active):  # type: ignore[no-untyped-def]
        self.passes += 1
        super()._draft_position(active)

    def ran(self) -> int:
        found, self.passes = self.passes, 0
        return found


def prepared(drafter: AheadDrafter) -> int:
    """Work until nothing is left; the number of pieces."""
    for pieces in range(500):
        if not drafter.work():
            return pieces
    raise AssertionError("background work does not end")


def opened(
    sid: int, tokens: Sequence[int], sampling: DraftSampling = GREEDY, ahead: bool = True
) -> SessionOpen:
    return SessionOpen(sid, tuple(tokens), len(tokens), sampling, ahead=ahead)


def asked(drafter: AheadDrafter | NestedDrafter, sid: int, budget: int, **fields: object) -> SessionDraft:
    (draft,) = drafter.propose([replace(DraftQuery(sid, 1, budget), **fields)])  # type: ignore[arg-type]
    return draft


PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, WITH_Q], ids=["greedy", "sampled", "q"])
@pytest.mark.parametrize("depth", [None, *EXITS])
def test_a_verdict_that_was_foreseen_is_answered_without_a_pass(
    sampling: DraftSampling, depth: int | None
) -> None:
    inner, twin = CountingDrafter(runner(), EXITS), NestedDrafter(runner(), EXITS)
    drafter = AheadDrafter(inner, outcomes=20, least=0.0)
    drafter.open(opened(1, PROMPT, sampling))
    twin.open(opened(1, PROMPT, sampling))
    for number in range(6):
        longer = asked(twin, 1, 4, exit_depth=depth)
        draft = asked(drafter, 1, 3, exit_depth=depth)
        assert (inner.ran() == 0) == (number > 0)
        assert draft.token_ids == longer.token_ids[:3]
        assert draft.exit_depth == longer.exit_depth
        assert draft.confidence == pytest.approx(longer.confidence[:3], abs=1e-3)
        assert [ids for ids, _ in draft.q] == [ids for ids, _ in longer.q[:3]]
        assert bool(draft.q) == (sampling is WITH_Q)
        prepared(drafter)
        # All three are accepted, and the target's own token is the one that the draft would have had next.
        for one in (drafter, twin):
            one.commit(1, longer.token_ids)
        inner.ran()
    assert drafter.ahead_counts.foreseen == 5
    assert (drafter.ahead_counts.partly, drafter.ahead_counts.missed) == (0, 0)


def test_the_likeliest_rejections_are_prepared_for() -> None:
    inner = CountingDrafter(runner(), EXITS)
    drafter = AheadDrafter(inner, outcomes=20, least=0.0)
    drafter.open(opened(1, PROMPT))
    tree = asked(drafter, 1, 3, tree=True, exit_depth=1)
    prepared(drafter)
    alternatives = [i for i, parent in enumerate(tree.parents) if parent == -1][1:]
    likely = max(alternatives, key=lambda i: tree.confidence[i])
    drafter.commit(1, [tree.token_ids[likely]])
    inner.ran()
    draft = asked(drafter, 1, 3, exit_depth=1)
    assert (inner.ran(), len(draft.token_ids)) == (0, 3)
    fresh = NestedDrafter(runner(), EXITS)
    fresh.open(opened(1, [*PROMPT, tree.token_ids[likely]]))
    assert draft.token_ids == asked(fresh, 1, 3, exit_depth=1).token_ids


def test_what_is_foreseen_in_part_costs_the_rest_only() -> None:
    inner = CountingDrafter(runner(), EXITS)
    drafter = AheadDrafter(inner)
    drafter.open(opened(1, PROMPT))
    whole = asked(drafter, 1, 4)
    inner.ran()
    # Two are accepted and nothing was prepared: the fourth token of the old draft is known.
    drafter.commit(1, whole.token_ids[:3])
    draft = asked(drafter, 1, 3)
    assert inner.ran() == 2
    assert draft.token_ids[0] == whole.token_ids[3]
    assert drafter.ahead_counts == AheadCounts(partly=1)
    drafter.commit(1, [(draft.token_ids[0] + 1) % VOCAB])
    asked(drafter, 1, 3)
    assert drafter.ahead_counts == AheadCounts(partly=1, missed=1)


def test_a_piece_of_preparing_is_one_step_of_some_sessions_in_turns() -> None:
    inner = CountingDrafter(runner(), EXITS)
    drafter = AheadDrafter(inner)
    count = SESSIONS_A_STEP + 3
    for sid in range(count):
        drafter.open(opened(sid, PROMPT))
    drafter.propose([DraftQuery(sid, 1, 2) for sid in range(count)])
    inner.ran()
    assert drafter.work()
    assert (inner.ran(), drafter.ahead_counts.steps) == (1, SESSIONS_A_STEP)
    assert drafter.work()
    assert inner.asked == [8, 9, 10, 0, 1, 2, 3, 4], "those that had no turn yet come first"
    prepared(drafter)
    assert not drafter.work(), "it ends by itself"
    drafter.commit(0, [1])
    assert not drafter.work(), "nobody has asked since"


def test_sessions_without_it_and_drafts_for_scoring_are_left_alone() -> None:
    inner = CountingDrafter(runner(), EXITS)
    drafter = AheadDrafter(inner)
    drafter.open(opened(1, PROMPT, ahead=False))
    drafter.open(opened(2, PROMPT))
    assert len(asked(drafter, 1, 3).token_ids) == 3
    assert len(asked(drafter, 2, 3, shadow=True).token_ids) == 3
    assert not drafter.work()
    # A draft for scoring at another exit leaves what was prepared as it is.
    first = asked(drafter, 2, 2, exit_depth=1)
    prepared(drafter)
    asked(drafter, 2, 4, exit_depth=EXITS[-1], shadow=True)
    inner.ran()
    drafter.commit(2, first.token_ids)
    assert len(asked(drafter, 2, 1, exit_depth=1).token_ids) == 1
    assert inner.ran() == 0
    assert drafter.ahead_counts.foreseen == 1
    for sid in (1, 2):
        drafter.close(sid)
    assert drafter.kv_blocks_used == 0


def test_another_exit_begins_anew() -> None:
    drafter, twin = AheadDrafter(NestedDrafter(runner(), EXITS)), NestedDrafter(runner(), EXITS)
    for one in (drafter, twin):
        one.open(opened(1, PROMPT))
    draft = asked(drafter, 1, 2, exit_depth=1)
    prepared(drafter)
    for one in (drafter, twin):
        one.commit(1, draft.token_ids)
    deeper, fresh = (asked(one, 1, 4, exit_depth=3) for one in (drafter, twin))
    assert (deeper.token_ids, deeper.exit_depth) == (fresh.token_ids, 3)
    # Sums of passes of other sizes are rounded in another order.
    assert deeper.confidence == pytest.approx(fresh.confidence, abs=1e-4)
    assert drafter.ahead_counts == AheadCounts(steps=drafter.ahead_counts.steps), (
        "not a miss of what was prepared"
    )


def test_a_full_pool_ends_preparing_and_nothing_else() -> None:
    # Two blocks of 32 tokens: the second session has no room to go on in.
    drafter = AheadDrafter(NestedDrafter(runner(2), EXITS))
    drafter.open(opened(1, [i % VOCAB for i in range(30)]))
    drafter.open(opened(2, [i % VOCAB for i in range(30)]))
    for _ in range(2):
        drafter.propose([DraftQuery(sid, 1, 3) for sid in (1, 2)])
        prepared(drafter)
    answers = drafter.propose([DraftQuery(sid, 1, 3) for sid in (1, 2)])
    assert all(answer.token_ids and answer.error is None for answer in answers)


kinds = st.sampled_from(("own", "alternative", "other"))
step = st.fixed_dictionaries(
    {
        "budget": st.integers(1, 4),
        "depth": st.sampled_from((None, None, 1, 3)),
        "tree": st.booleans(),
        "accept": st.integers(0, 4),
        "bonus": kinds,
        "work": st.sampled_from((0, 1, 3, 500)),
        "silent": st.booleans(),
    }
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    prompts=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40), min_size=2, max_size=2),
    history=st.lists(step, min_size=1, max_size=8),
    samplings=st.tuples(*[st.sampled_from((GREEDY, SAMPLED, WITH_Q))] * 2),
    stop=st.sampled_from((0.0, 0.2)),
)
def test_prepared_drafts_are_those_of_just_in_time(prompts, history, samplings, stop):  # type: ignore[no-untyped-def]
    """Whatever the verdicts, and however much was prepared. Every row that is drafted from is compared with a
    fresh pass as well."""
    drafter = AheadDrafter(CheckedDrafter(runner(), EXITS, catch_up=128))
    twin = NestedDrafter(runner(), EXITS, catch_up=128)
    for one in (drafter, twin):
        for sid, tokens in enumerate(prompts):
            one.open(opened(sid, tokens, samplings[sid]))
        one.propose([DraftQuery(sid, 1, 1) for sid in range(2)])
    prepared(drafter)
    while twin.work():
        pass
    for do in history:
        trees = [do["tree"] and samplings[sid] is not WITH_Q for sid in range(2)]
        queries = [
            DraftQuery(sid, 1, do["budget"], do["depth"], tree=trees[sid], min_survival=stop)
            for sid in range(2)
        ]
        drafts, expected = drafter.propose(queries), twin.propose(queries)
        own = twin.propose([replace(query, budget=5, min_survival=0.0) for query in queries])
        for _ in range(do["work"]):
            if not drafter.work():
                break
        for sid in range(2):
            got, wanted = best_chain(drafts[sid]).token_ids, best_chain(expected[sid]).token_ids
            # What is known is given also where drafting would have ended early.
            assert got[: len(wanted)] == wanted[: len(got)]
            assert len(got) >= len(wanted)
            assert len(got) <= do["budget"]
            new = list(got[: do["accept"]])
            going_on = best_chain(own[sid]).token_ids
            bonus = going_on[len(new)] if len(new) < len(going_on) else 0
            if do["bonus"] == "alternative" and drafts[sid].parents:
                bonus = drafts[sid].token_ids[-1]
            elif do["bonus"] == "other":
                bonus = (bonus + 7) % VOCAB
            for one in (drafter, twin):
                one.commit(sid, [*new, bonus])
            if do["silent"]:  # a verdict without a wish
                for one in (drafter, twin):
                    one.commit(sid, [bonus])


def test_a_guess_tree_by_hand() -> None:
    tree = GuessTree(outcomes=3, least=0.1)
    tree.graft(tree.root, SessionDraft(1, 1, (5, 6, 7), parents=(-1, -1, 0), confidence=(0.6, 0.3, 0.5)))
    chain = tree.chain(2)
    assert [guess.token_id for guess in chain] == [5, 7]
    tree.expect(chain, 2)

    def steps() -> Iterator[tuple[tuple[int, ...], float]]:
        while (outcome := tree.next()) is not None:
            yield outcome.at.path(), outcome.probability
            if len(outcome.at.path()) == 2 and outcome.splits:
                tree.prepared(outcome, SessionDraft(1, 1, (8, 9), parents=(-1, -1), confidence=(0.7, 0.2)))
            else:
                tree.prepared(outcome, SessionDraft(1, 1, (1,), confidence=(0.9,)))

    assert [(path, pytest.approx(p)) for path, p in steps()] == [
        # All accepted (0.6 * 0.5) is as likely as a rejection at once (0.3), which was there first.
        ((6,), 0.3), ((6, 1), 0.3),
        ((5, 7), 0.3),
        # Behind it the target's own token: 8 (0.3 * 0.7); 9 (0.06) is too unlikely.
        ((5, 7, 8), 0.21), ((5, 7, 8, 1), 0.21),
    ]  # fmt: skip
    assert tree.follow([5, 7, 8])
    assert [guess.token_id for guess in tree.chain(9)] == [1, 1]
    assert not tree.follow([2])
    assert tree.chain(9) == []


def test_cores_that_are_shared() -> None:
    here, there = Cores("a", frozenset({0, 1})), Cores("b", frozenset({0, 1}))
    assert here.apart_from(there)
    assert not here.apart_from(Cores("a", frozenset({1, 2})))
    assert here.apart_from(Cores("a", frozenset({2, 3})))
    assert here.apart_from(Cores("a")), "a target on a GPU"
    assert Cores("a").apart_from(here), "a draft on a GPU"
    assert not here.apart_from(Cores()), "a target that does not say"
    assert not Cores().apart_from(here)


def test_own_cores(tmp_path: Path) -> None:
    boot = tmp_path / "boot_id"
    boot.write_text("abc\n")
    ours = cores_of("cpu", boot)
    assert ours.host == "abc"
    assert ours.cpus
    assert cores_of("cuda", boot) == Cores("abc")
    assert cores_of("cpu", tmp_path / "none").host


def test_the_policy_decides_by_what_a_target_says_of_itself() -> None:
    near, far = pb.Hello(host="a", cpus=[1]), pb.Hello(host="b", cpus=[1])
    policy = AheadPolicy(cores=Cores("a", frozenset({0, 1})))
    assert [policy.holds_for(h) for h in (near, far, pb.Hello())] == [False, True, False]
    assert all(AheadPolicy(True).holds_for(h) for h in (near, far, pb.Hello()))
    assert not any(replace(policy, always=False).holds_for(h) for h in (near, far, pb.Hello()))
    assert not AheadPolicy().holds_for(far), "a pool without a nested drafter"
