"""Continuous batching: fairness between prompts and streams, preemption, prefix reuse."""

from __future__ import annotations

import torch

from actors.drafting.interface import SessionDraft
from actors.engine.batch import build_batch
from actors.engine.messages import EngineRequest
from actors.engine.scheduler import Scheduler, SchedulerLimits
from actors.engine.sequence import Sequence
from actors.kv.block_pool import BlockPool
from actors.sampling.params import SamplingParams
from actors.verification.registry import get_rule


def _seq(
    name: str, prompt_len: int, max_tokens: int = 64, first: int = 0, prompt_logprobs: int | None = None
) -> Sequence:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0, prompt_logprobs=prompt_logprobs)
    request = EngineRequest(name, tuple(range(first, first + prompt_len)), sampling)
    return Sequence(request, None, get_rule("coupled"), 0, 4)


def _scheduler(blocks: int = 64, seqs: int = 8, rows: int = 128, chunk: int = 32) -> Scheduler:
    return Scheduler(BlockPool(blocks, 32), SchedulerLimits(seqs, rows, chunk))


def _run(scheduler: Scheduler, token: int = 7) -> list[tuple[str, int]]:
    works = scheduler.schedule({})
    for work in works:
        if work.completes:
            work.seq.token_ids.append(token)
            scheduler.commit(work.seq, len(work.seq.token_ids) - 1)
        else:
            scheduler.commit(work.seq, work.seq.num_computed + work.num_tokens)
    scheduler.pool.check()
    return [(w.seq.request.request_id, w.num_rows) for w in works]


def test_a_long_prompt_does_not_stall_a_running_stream() -> None:
    scheduler = _scheduler()
    scheduler.add(_seq("a", 10))
    assert _run(scheduler) == [("a", 10)]
    scheduler.add(_seq("long", 100, first=1000))
    steps = [_run(scheduler) for _ in range(5)]
    assert all(("a", 1) in step for step in steps)
    assert [dict(step).get("long") for step in steps] == [32, 32, 32, 4, 1]


def test_a_lone_prompt_takes_the_whole_step() -> None:
    scheduler = _scheduler()
    scheduler.add(_seq("long", 200))
    assert _run(scheduler) == [("long", 128)]
    assert _run(scheduler) == [("long", 72)]


def test_drafts_are_dropped_before_anybody_is_preempted() -> None:
    scheduler = _scheduler(blocks=1)
    seq = _seq("a", 29)
    scheduler.add(seq)
    _run(scheduler)
    draft = SessionDraft(seq.session_id, 1, (1, 2, 3, 4), drafter="d")
    work = scheduler.schedule({seq: (draft, 4)})[0]
    assert len(work.drafts) == 2
    assert scheduler.num_preemptions == 0


def test_the_youngest_gives_way_and_everybody_finishes() -> None:
    scheduler = _scheduler(blocks=4, rows=128)
    for index, name in enumerate("abc"):
        scheduler.add(_seq(name, 30, first=1000 * index))
    done: set[str] = set()
    for _ in range(600):
        _run(scheduler)
        for seq in list(scheduler.running.values()):
            if seq.num_outputs >= 64:
                scheduler.remove(seq)
                done.add(seq.request.request_id)
    assert done == {"a", "b", "c"}
    assert scheduler.num_preemptions > 0
    assert scheduler.pool.num_free == 4


def test_equal_prompts_share_blocks_but_compute_their_last_token() -> None:
    scheduler = _scheduler()
    scheduler.add(_seq("a", 64))
    _run(scheduler)
    scheduler.add(_seq("b", 64))
    assert ("b", 32) in _run(scheduler)
    assert scheduler.running["b"].cached_tokens == 32
    assert scheduler.running["a"].blocks[0] == scheduler.running["b"].blocks[0]


def test_what_a_preempted_prompt_finds_of_its_own_work_was_not_cached() -> None:
    scheduler = _scheduler(blocks=4)
    scheduler.add(_seq("a", 31))
    _run(scheduler)
    late = _seq("late", 70, first=1000)
    scheduler.add(late)
    while not scheduler.num_preemptions:
        _run(scheduler)
    assert not late.num_outputs
    scheduler.remove(scheduler.running["a"])
    scheduler.schedule({})
    assert late.num_computed > 0, "what is left of its blocks is used"
    assert late.cached_tokens == 0


def test_what_the_cache_had_at_first_is_told_though_it_is_lost_by_a_preemption() -> None:
    scheduler = _scheduler(blocks=4)
    first = _seq("first", 64)
    scheduler.add(first)
    _run(scheduler)
    scheduler.remove(first)
    again = _seq("again", 64)
    scheduler.add(again)
    scheduler.schedule({})
    assert again.cached_tokens == 32
    assert scheduler._preempt_youngest() is again
    scheduler.pool.reset_cache()
    scheduler.schedule({})
    assert (again.num_computed, again.cached_tokens) == (0, 32)


def test_a_prompt_whose_scores_were_reported_is_not_scored_again() -> None:
    """Until then no row may come from the cache, and each row's logits are asked for."""
    scheduler = _scheduler()
    seq = _seq("a", 70, prompt_logprobs=0)
    scheduler.add(seq)
    for reported, rows, logits in ((False, 70, 70), (True, 7, 1)):
        seq.reported_first = reported
        works = scheduler.schedule({})
        assert [work.num_rows for work in works] == [rows]
        batch, spans = build_batch(works, torch.device("cpu"))
        assert len(batch.logit_rows) == logits
        assert (spans[0].last - spans[0].first, spans[0].decisions) == (logits, 1)
        seq.token_ids.append(7)
        scheduler.commit(seq, len(seq.token_ids) - 1)
        assert scheduler._preempt_youngest() is seq


def test_admission_waits_for_slots_and_blocks() -> None:
    scheduler = _scheduler(blocks=3, seqs=2)
    for index, name in enumerate("abc"):
        scheduler.add(_seq(name, 40, first=100 * index))
    _run(scheduler)
    assert list(scheduler.running) == ["a"]
    scheduler.remove(scheduler.running["a"])
    _run(scheduler)
    assert list(scheduler.running) == ["b"]


def _drafts(scheduler: Scheduler, length: int) -> dict[Sequence, tuple[SessionDraft, int]]:
    return {
        seq: (SessionDraft(seq.session_id, 1, (1,) * length, drafter="d"), length)
        for seq in scheduler.running.values()
        if seq.decoding
    }


def test_drafts_leave_a_row_for_everybody_and_a_chunk_for_prompts() -> None:
    scheduler = _scheduler(rows=64, chunk=16)
    for index in range(8):
        scheduler.add(_seq(f"s{index}", 5, first=100 * index))
    _run(scheduler)
    works = scheduler.schedule(_drafts(scheduler, 12))
    assert len(works) == 8
    assert sum(work.num_rows for work in works) == 64
    for seq in list(scheduler.running.values())[6:]:
        scheduler.remove(seq)
    scheduler.add(_seq("late", 30, first=1000))
    works = scheduler.schedule(_drafts(scheduler, 12))
    assert [work.seq.request.request_id for work in works] == [*(f"s{index}" for index in range(6)), "late"]
    assert works[-1].num_rows == 16
    assert sum(work.num_rows for work in works) == 64
