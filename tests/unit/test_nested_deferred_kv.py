"""Deferred KV gives the logits of a fresh pass, whatever was accepted, rejected, evicted or exited before."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.drafting.deferred_kv import DeferredKv
from actors.drafting.draw import MAX_Q, draw_tokens
from actors.drafting.errors import DrafterError
from actors.drafting.interface import MAX_HELD_STATES, SCOPE_SHIFT, DraftQuery, SessionDraft, SessionOpen
from actors.drafting.nested import ABSORB_FROM, SELDOM, NestedDrafter
from actors.models.llama_weights import LlamaLayerWeights, LlamaWeights
from actors.models.runner import BLOCK_SIZE, ModelInfo, RaggedBatch, state_rows
from actors.models.torch_llama import TorchLlamaRunner
from actors.sampling.noise import gumbel
from actors.sampling.params import DraftSampling

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, DIM, MAX_LEN = 48, 32, 6, 4, 2, 8, 256
EXITS = (1, 3, LAYERS)
GREEDY = DraftSampling(key=1)


def _weights() -> LlamaWeights:
    generator = torch.Generator().manual_seed(5)

    def matrix(rows: int, columns: int) -> Tensor:
        # Large enough that the argmax depends on the whole context.
        return torch.randn(rows, columns, generator=generator) * 0.5

    layers = tuple(
        LlamaLayerWeights(
            qkv=matrix((HEADS + 2 * KV_HEADS) * DIM, HIDDEN),
            o=matrix(HIDDEN, HEADS * DIM),
            gate_up=matrix(2 * HIDDEN, HIDDEN),
            down=matrix(HIDDEN, HIDDEN),
            input_norm=torch.ones(HIDDEN),
            post_norm=torch.ones(HIDDEN),
        )
        for _ in range(LAYERS)
    )
    return LlamaWeights(
        embed=matrix(VOCAB, HIDDEN),
        layers=layers,
        final_norm=torch.ones(HIDDEN),
        head=matrix(VOCAB, HIDDEN),
        inv_freq=1.0 / (10000.0 ** (torch.arange(0, DIM, 2).float() / DIM)),
        attention_scaling=1.0,
        rms_norm_eps=1e-5,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        max_position=MAX_LEN,
    )


WEIGHTS = _weights()


def runner(num_blocks: int = 64) -> TorchLlamaRunner:
    shape = (LAYERS, HIDDEN, HEADS, KV_HEADS, DIM, VOCAB, MAX_LEN)
    info = ModelInfo("tiny", "llama", *shape, torch.float32, torch.device("cpu"))
    return TorchLlamaRunner(WEIGHTS, info, num_blocks, threads=1)


_REFERENCE = runner(MAX_LEN // BLOCK_SIZE)


STATES = 12
STATE_IN = torch.randn(HIDDEN, STATES, generator=torch.Generator().manual_seed(6)) * 0.5
States = dict[int, Tensor]
"""By index of a token: the target's state there, [STATES]."""


def fresh_logits(tokens: Sequence[int], depth: int, states: States | None = None) -> Tensor:
    """float32 [V] after the last token, from one pass of the first `depth` layers over everything."""
    n = len(tokens)
    batch = RaggedBatch(
        token_ids=torch.tensor(tokens),
        positions=torch.arange(n),
        query_start=torch.tensor([0, n]),
        context_lens=torch.tensor([n]),
        block_tables=torch.arange(-(-n // BLOCK_SIZE), dtype=torch.int32)[None],
        logit_rows=torch.tensor([n - 1]),
    )
    hidden = _REFERENCE.embed(batch.token_ids)
    for index, state in (states or {}).items():
        hidden[index] += STATE_IN @ (state / state.square().mean().sqrt())
    hidden = _REFERENCE.run_layers(hidden, 0, depth, batch)
    return _REFERENCE.logits(hidden[-1:])[0]


class CheckedDrafter(NestedDrafter):
    """Compares every row that it drafts from with a fresh pass. `states`: what was told, by session."""

    checked = 0
    states: dict[int, States] | None = None

    def _draw(self, logits, proposals, block):  # type: ignore[no-untyped-def]
        for row, proposal in zip(logits, proposals, strict=True):
            states = None if self.states is None else self.states[proposal.query.session_id]
            expected = fresh_logits(proposal.session.seq.tokens, self.exits[block], states)
            torch.testing.assert_close(row, expected, atol=2e-3, rtol=1e-3)
            self.checked += 1
        super()._draw(logits, proposals, block)


def open_session(
    drafter: NestedDrafter, sid: int, tokens: Sequence[int], sampling: DraftSampling = GREEDY
) -> None:
    drafter.open(SessionOpen(sid, tuple(tokens), len(tokens), sampling))


def propose(drafter: NestedDrafter, sid: int, budget: int, exit_depth: int | None = None) -> SessionDraft:
    (draft,) = drafter.propose([DraftQuery(sid, 1, budget, exit_depth)])
    return draft


def absorb(drafter: NestedDrafter) -> None:
    for _ in range(100):
        if not drafter.work():
            return
    raise AssertionError("background work does not end")


step = st.fixed_dictionaries(
    {
        "asks": st.lists(
            st.tuples(st.integers(0, 2), st.integers(1, 5), st.sampled_from((None, *EXITS))),
            min_size=1,
            max_size=3,
            unique_by=lambda ask: ask[0],
        ),
        "accept": st.integers(0, 5),
        "corrections": st.lists(st.integers(0, VOCAB - 1), min_size=0, max_size=3),
        "work": st.booleans(),
        "reopen": st.booleans(),
        "states": st.integers(0, 6),
    }
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    prompts=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=70), min_size=3, max_size=3),
    history=st.lists(step, min_size=1, max_size=8),
    thresholds=st.sampled_from((None, (0.3, 0.3), (0.0, 0.0), (1.0, 1.0))),
    blocks=st.sampled_from((6, 64)),
    reads=st.booleans(),
)
def test_drafting_logits_equal_a_fresh_pass(prompts, history, thresholds, blocks, reads):  # type: ignore[no-untyped-def]
    """With `reads` the target tells states of some of the last tokens, drafted ones among them."""
    drafter = CheckedDrafter(
        runner(blocks), EXITS, thresholds=thresholds, prefill_chunk=16, catch_up=24, keep_rounds=1,
        state_in=STATE_IN if reads else None,
    )  # fmt: skip
    drafter.states = {sid: {} for sid in range(3)}
    truth = [list(p) for p in prompts]
    generator = torch.Generator().manual_seed(7)
    for sid, tokens in enumerate(truth):
        open_session(drafter, sid, tokens)
    for do in history:
        if do["work"]:
            absorb(drafter)
        drafts = drafter.propose([DraftQuery(sid, 1, budget, depth) for sid, budget, depth in do["asks"]])
        for (sid, budget, _), draft in zip(do["asks"], drafts, strict=True):
            assert len(draft.token_ids) <= budget
            # Accepted drafts, then the target's own tokens (none: the verdict was cut short).
            new = [*draft.token_ids[: do["accept"]], *do["corrections"]]
            drafter.commit(sid, new)
            truth[sid].extend(new)
            if reads and (told := min(len(new), do["states"])):
                states = torch.randn(told, STATES, generator=generator)
                drafter.note_states(sid, state_rows(states))
                drafter.states[sid].update(
                    zip(range(len(truth[sid]) - told, len(truth[sid])), states, strict=True)
                )
        if do["reopen"]:
            sid = do["asks"][0][0]
            open_session(drafter, sid, truth[sid])
            drafter.states[sid] = {}
    # A prompt is absorbed once its session was asked for.
    drafter.propose([DraftQuery(sid, 1, 1) for sid in range(3)])
    absorb(drafter)
    before = drafter.checked
    final = drafter.propose([DraftQuery(sid, 1, 3) for sid in range(3)])
    assert blocks == 6 or all(len(d.token_ids) == 3 for d in final)
    assert drafter.checked - before == sum(len(d.token_ids) for d in final)
    for sid in range(3):
        drafter.close(sid)
    assert drafter.kv_blocks_used == 0


def test_full_depth_draft_is_the_targets_own_continuation() -> None:
    sampling = DraftSampling(key=77, temperature=0.9, top_k=20, top_p=0.9, min_p=0.01)
    for mode in (GREEDY, sampling):
        drafter = NestedDrafter(runner(), EXITS)
        tokens = [3, 1, 4, 1, 5]
        open_session(drafter, 0, tokens, mode)
        for round_ in range(6):
            draft = propose(drafter, 0, 1 + round_ % 5, exit_depth=LAYERS)
            assert draft.exit_depth == LAYERS
            for token in draft.token_ids:
                (expected,) = draw_tokens(fresh_logits(tokens, LAYERS)[None], [mode], [len(tokens)])
                assert token == expected.token_id
                tokens.append(token)
            drafter.commit(0, draft.token_ids)


def test_shallow_tokens_have_no_kv_in_deeper_blocks_until_asked() -> None:
    kv = DeferredKv(runner(), EXITS)
    seq = kv.new_sequence([1, 2, 3, 4])
    kv.reserve(seq, 4)
    kv.advance([seq], 0, [4])
    assert seq.lengths == [4, 0, 0]
    assert [seq.waiting(b) for b in range(3)] == [0, 4, 0]
    kv.advance([seq], 1, [4])
    seq.rollback(2)
    assert seq.lengths == [2, 2, 0]
    assert seq.waiting(2) == 2
    hidden = kv.advance([seq], 2, [2])
    torch.testing.assert_close(
        _REFERENCE.logits(hidden)[0], fresh_logits([1, 2], LAYERS), atol=1e-4, rtol=1e-4
    )
    with pytest.raises(ValueError, match="wait for segment"):
        kv.advance([seq], 2, [1])


def test_commit_keeps_the_longest_common_prefix() -> None:
    drafter = NestedDrafter(runner(), EXITS)
    open_session(drafter, 0, [1, 2, 3])
    draft = propose(drafter, 0, 4).token_ids
    wrong = (draft[2] + 1) % VOCAB
    drafter.commit(0, [*draft[:2], wrong])
    seq = drafter._sessions[0].seq
    assert seq.tokens == [1, 2, 3, *draft[:2], wrong]
    assert seq.lengths[0] == 5


def test_long_prompts_are_absorbed_in_the_background_only() -> None:
    drafter = NestedDrafter(runner(), EXITS, prefill_chunk=16, catch_up=20)
    open_session(drafter, 0, [i % VOCAB for i in range(100)])
    assert propose(drafter, 0, 3).token_ids == ()
    chunks = 0
    while drafter.work():
        chunks += 1
    assert chunks >= 5
    assert len(propose(drafter, 0, 3).token_ids) == 3
    # A deeper exit has its own backlog: it waits for the background, then drafts.
    assert propose(drafter, 0, 3, exit_depth=LAYERS).token_ids == ()
    absorb(drafter)
    assert len(propose(drafter, 0, 3, exit_depth=LAYERS).token_ids) == 3


def test_many_prompts_of_one_target_do_not_keep_those_of_another_waiting() -> None:
    drafter = NestedDrafter(runner(), EXITS, prefill_chunk=16, catch_up=20)
    prompt = [i % VOCAB for i in range(100)]
    other = (2 << SCOPE_SHIFT) + 1
    for sid in (*((1 << SCOPE_SHIFT) + n for n in range(8)), other):
        open_session(drafter, sid, prompt)
        propose(drafter, sid, 1)
    pieces = 0
    while not propose(drafter, other, 1).token_ids:
        assert drafter.work()
        pieces += 1
    # Five pieces leave no more than a draft catches up with; each other piece is the first target's.
    assert pieces <= 10
    absorb(drafter)


def test_who_is_seldom_asked_for_costs_no_background_work() -> None:
    """And is drafted for as ever once it is: what waits runs in that pass."""
    drafter = CheckedDrafter(runner(), EXITS, catch_up=64, absorb_from=8)
    open_session(drafter, 0, [1, 2, 3])
    assert len(propose(drafter, 0, 2).token_ids) == 2
    for token in range(30):
        drafter.commit(0, [token])
        if drafter.work():
            assert token < SELDOM + 4, "passed over, and absorbed all the same"
    checked = drafter.checked
    assert len(propose(drafter, 0, 2).token_ids) == 2
    assert drafter.checked == checked + 2
    for token in range(ABSORB_FROM + 1):
        drafter.commit(0, [token])
        propose(drafter, 0, 0)
    assert drafter.work(), "asked again: absorbed again"


@pytest.mark.parametrize("reads_states", [False, True])
def test_a_session_that_nobody_asks_for_holds_no_more_than_its_context(reads_states: bool) -> None:
    drafter = NestedDrafter(runner(8), EXITS, context=BLOCK_SIZE, state_in=STATE_IN if reads_states else None)
    open_session(drafter, 0, [1, 2, 3])
    assert len(propose(drafter, 0, 2).token_ids) == 2
    for token in range(3 * BLOCK_SIZE):
        drafter.commit(0, [token % VOCAB])
        drafter.note_states(0, state_rows(torch.zeros(1, STATES)))
    assert drafter.kv_blocks_used <= 2
    assert len(drafter._sessions[0].seq.states) <= 2 * BLOCK_SIZE


@pytest.mark.parametrize("depth", EXITS)
def test_a_bounded_context_drafts_as_if_the_session_began_there(depth: int) -> None:
    """Rotation is relative: the tail of a session at its own positions is the tail alone."""
    drafter = NestedDrafter(runner(8), EXITS, context=BLOCK_SIZE + 5, max_sessions=4)
    prompt = [(11 * i + i * i) % VOCAB for i in range(7 * BLOCK_SIZE - 9)]
    first = (len(prompt) - BLOCK_SIZE - 5) // BLOCK_SIZE * BLOCK_SIZE
    open_session(drafter, 0, prompt)
    propose(drafter, 0, 1, depth)  # says that it is wanted, and how deep
    absorb(drafter)
    tail = prompt[first:]
    for token in propose(drafter, 0, 4, depth).token_ids:
        assert token == int(fresh_logits(tail, depth).argmax())
        tail.append(token)
    assert drafter.kv_blocks_used <= 3


@pytest.mark.parametrize("depth", EXITS)
def test_states_of_more_tokens_than_the_draft_sees(depth: int) -> None:
    """A source keeps states of up to `MAX_HELD_STATES` tokens, a draft may see fewer."""
    drafter = NestedDrafter(runner(8), EXITS, context=BLOCK_SIZE, state_in=STATE_IN, catch_up=MAX_LEN)
    open_session(drafter, 0, [1, 2, 3])
    propose(drafter, 0, 2, depth)
    new = [(11 * i + i * i) % VOCAB for i in range(3 * BLOCK_SIZE)]
    drafter.commit(0, new)
    states = torch.randn(MAX_HELD_STATES, STATES, generator=torch.Generator().manual_seed(9))
    drafter.note_states(0, state_rows(states))
    whole = [1, 2, 3, *new]
    first = (len(whole) - BLOCK_SIZE) // BLOCK_SIZE * BLOCK_SIZE
    assert len(whole) - MAX_HELD_STATES < first
    tail, seen = whole[first:], states[first - len(whole) :]
    for token in propose(drafter, 0, 4, depth).token_ids:
        assert token == int(fresh_logits(tail, depth, dict(enumerate(seen))).argmax())
        tail.append(token)
    assert len(tail) == len(whole) - first + 4


def test_states_of_forgotten_tokens_are_forgotten() -> None:
    drafter = CheckedDrafter(runner(), EXITS, state_in=STATE_IN)
    open_session(drafter, 0, [1, 2, 3])
    drafter.commit(0, [4, 5, 6])
    states = torch.randn(3, STATES, generator=torch.Generator().manual_seed(8))
    drafter.note_states(0, state_rows(states))
    drafter.rewind(0, 4)
    drafter.states = {0: {3: states[0]}}
    assert len(propose(drafter, 0, 3).token_ids) == 3
    drafter.commit(0, [9, 9])
    assert len(propose(drafter, 0, 3, LAYERS).token_ids) == 3
    assert drafter.checked == 6
    with pytest.raises(ValueError, match="7 states for 6 committed tokens"):
        drafter.note_states(0, state_rows(torch.randn(7, STATES)))


def test_thresholds_choose_the_exit() -> None:
    for taus, depth in (((0.0, 0.0), 1), ((1.0, 0.0), 3), ((1.0, 1.0), LAYERS)):
        drafter = NestedDrafter(runner(), EXITS, thresholds=taus)
        open_session(drafter, 0, [7, 8, 9])
        assert propose(drafter, 0, 1).exit_depth == depth


def test_a_full_pool_refuses_sessions_in_use_and_evicts_idle_ones() -> None:
    drafter = CheckedDrafter(runner(num_blocks=2), EXITS, catch_up=40, keep_rounds=3)
    for sid in range(3):
        open_session(drafter, sid, [(sid + i * i) % VOCAB for i in range(30)])
    drafts = drafter.propose([DraftQuery(sid, 1, 2) for sid in range(3)])
    assert [d.error for d in drafts] == [None, None, "capacity"]
    assert [len(d.token_ids) for d in drafts] == [2, 2, 0]
    for _ in range(5):
        assert len(propose(drafter, 0, 2).token_ids) == 2
    assert len(propose(drafter, 2, 2).token_ids) == 2
    assert drafter._sessions[1].parked
    assert not drafter.work()
    drafter.close(0)
    assert len(propose(drafter, 1, 2).token_ids) == 2


def test_limits_and_errors() -> None:
    drafter = NestedDrafter(runner(), EXITS, max_sessions=1, catch_up=MAX_LEN)
    open_session(drafter, 0, [1] * (MAX_LEN - 2))
    assert len(propose(drafter, 0, 8).token_ids) == 2
    with pytest.raises(DrafterError) as caught:
        open_session(drafter, 1, [1])
    assert caught.value.code == "capacity"
    assert propose(drafter, 0, 1, exit_depth=2).error == "unsupported"
    with pytest.raises(DrafterError) as caught:
        propose(drafter, 9, 1)
    assert caught.value.code == "unknown_session"
    for exits in ((), (3, 1), (0, 1), (1, LAYERS + 1)):
        with pytest.raises(ValueError, match="exits"):
            NestedDrafter(runner(1), exits)


def test_coupled_draws_use_the_targets_noise() -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    sampling = DraftSampling(key=123, temperature=0.7)
    for position in range(20):
        (draw,) = draw_tokens(logits[None], [sampling], [position])
        assert draw.q is None
        assert draw.token_id == int((logits / 0.7 + gumbel(123, position, VOCAB)).argmax())


def test_leviathan_draws_follow_the_shipped_distribution() -> None:
    logits = torch.randn(200, generator=torch.Generator().manual_seed(1)) * 2
    sampling = DraftSampling(key=9, temperature=1.0, rule="leviathan")
    draws = draw_tokens(logits.repeat(1500, 1), [sampling] * 1500, range(1500))
    ids, probabilities = draws[0].q or ((), ())
    assert len(ids) == MAX_Q
    assert sum(probabilities) == pytest.approx(1.0, abs=1e-5)
    assert set(ids) == set(logits.topk(MAX_Q).indices.tolist())
    counts = dict.fromkeys(ids, 0)
    for draw in draws:
        counts[draw.token_id] += 1
    # Pearson's statistic over the ids that expect at least 5 draws: mean n, deviation sqrt(2 n).
    cells = [(counts[i], p * 1500) for i, p in zip(ids, probabilities, strict=True) if p * 1500 >= 5]
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    assert abs(statistic - len(cells)) < 5 * (2 * len(cells)) ** 0.5
    (greedy,) = draw_tokens(logits[None], [DraftSampling(key=9, rule="leviathan")], [0])
    assert greedy.q is None
    assert greedy.token_id == int(logits.argmax())
