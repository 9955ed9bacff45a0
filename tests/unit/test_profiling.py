"""When the costs of rounds are measured again, and what becomes of it where requests come between."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from actors.costs import CostModel
from actors.engine import profiling
from actors.engine.profiling import CostProfiler
from actors.kv.block_pool import BlockPool
from actors.models.runner import BLOCK_SIZE, ModelInfo, RaggedBatch

_VOCAB, _MAX_LEN = 16, 2048
_ROW_COUNTS = (1, 2, 3, 5, 9, 17, 33)


class _Clock:
    """In place of `time`: seconds pass while a model computes, and only then."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class _Runner:
    """Passes that take what they are told to, with a speed that changes."""

    row_invariant = True
    supports_trees = False
    num_blocks = 128

    def __init__(self, clock: _Clock) -> None:
        self.info = ModelInfo(
            "toy", "Toy", 1, 8, 1, 1, 8, _VOCAB, _MAX_LEN, torch.float32, torch.device("cpu")
        )
        self.slowdown = 1.0
        self.passes: list[tuple[int, int, int]] = []
        """Rows and KV entries before them of each of so many sequences."""
        self._clock = clock

    def forward(self, batch: RaggedBatch) -> torch.Tensor:
        assert len(set(batch.block_tables.flatten().tolist())) == batch.block_tables.numel()
        rows, context = batch.num_tokens // batch.num_seqs, int(batch.positions[0])
        self.passes.append((rows, context, batch.num_seqs))
        read = 0.001 if batch.num_seqs == 1 else 0.0008
        attended = batch.num_seqs * context * (read + 0.0005 * (rows - 1))
        self._clock.now += self.slowdown * (4.0 + 0.2 * batch.num_tokens + attended) / 1e3
        return torch.zeros(batch.num_tokens, _VOCAB)


class _Rig:
    def __init__(self) -> None:
        self.runner = _Runner(_Clock())
        self.pool = BlockPool(self.runner.num_blocks, BLOCK_SIZE)
        self.costs = CostModel()
        self.profiler = CostProfiler(self.runner, self.pool, self.costs, _MAX_LEN)  # type: ignore[arg-type]

    def after(self, passes: int) -> Callable[[], bool]:
        """Whether so many more have run."""
        end = len(self.runner.passes) + passes
        return lambda: len(self.runner.passes) >= end

    def told(self) -> tuple[dict[str, float], dict[str, float]]:
        return self.costs.table(), self.costs.attention_table()


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> _Rig:
    rig = _Rig()
    monkeypatch.setattr(profiling, "time", rig.runner._clock)
    rig.profiler.profile()
    return rig


def _never() -> bool:
    return False


_ATTENTION = [
    *[(1, 1024, 1), (1, 64, 1)] * 3,
    *[(9, 1024, 1), (9, 64, 1)] * 3,
    *[(1, 512, 4), (1, 64, 4)] * 3,
]
_TURN = [(rows, 64, 1) for rows in _ROW_COUNTS]


def test_all_is_measured_at_the_start_and_three_times_again(rig: _Rig) -> None:
    assert rig.runner.passes == [*_ATTENTION, *_TURN * 3]
    assert rig.costs.measured() == pytest.approx(
        {rows: (4.0 + 0.2 * rows + 64 * (0.001 + 0.0005 * (rows - 1))) / 1e3 for rows in _ROW_COUNTS}
    )
    assert rig.costs.attention_s(1000) == pytest.approx(1e-3)
    assert rig.costs.drafted_attention_s(1000) == pytest.approx(0.5e-3)
    assert rig.costs.attention_s(1000, sequences=4) == pytest.approx(0.8e-3)
    before = rig.told()
    rig.runner.passes.clear()
    while rig.profiler.work(_never):
        pass
    assert rig.runner.passes == [*_ATTENTION, *_TURN * 5] * 3
    assert rig.told() == before
    assert rig.pool.num_free == rig.pool.num_blocks


def test_a_message_waits_for_one_pass_at_most_and_nothing_is_lost_by_it(rig: _Rig) -> None:
    rig.runner.passes.clear()
    for count in range(1, 3 * (len(_ATTENTION) + 5 * len(_TURN)) + 1):
        assert rig.profiler.work(rig.after(1))
        assert len(rig.runner.passes) == count
    assert not rig.profiler.work(rig.after(1))
    assert rig.runner.passes == [*_ATTENTION, *_TURN * 5] * 3


def test_times_count_when_all_that_they_are_compared_with_are_there(rig: _Rig) -> None:
    before = rig.told()
    rig.runner.slowdown = 0.5
    assert rig.profiler.work(rig.after(11))
    assert rig.told() == before
    assert rig.profiler.work(_never)
    assert rig.costs.attention_s(1000) == pytest.approx(0.5e-3)


def test_a_turn_that_a_request_comes_into_is_taken_anew(rig: _Rig) -> None:
    """Its row counts are compared with each other, and the machine may be another after the request. What
    context costs is told by the quickest passes, whenever they were."""
    before, passes = rig.told(), rig.runner.passes
    passes.clear()
    assert rig.profiler.work(rig.after(5))
    rig.profiler.interrupted()
    while len(passes) < len(_ATTENTION):
        assert rig.profiler.work(_never)
    assert passes == _ATTENTION
    for _ in range(4):  # more often than turns are whole: their median would tell
        passes.clear()
        rig.runner.slowdown = 3.0
        assert rig.profiler.work(rig.after(3))
        rig.profiler.interrupted()
        rig.runner.slowdown = 1.0
        assert rig.profiler.work(_never)
        assert passes == [*_TURN[:3], *_TURN]
    assert rig.told() == before


def test_nothing_is_measured_in_blocks_that_hold_something(rig: _Rig) -> None:
    rig.runner.passes.clear()
    assert rig.profiler.work(rig.after(1))
    held = rig.pool.allocate(100)
    assert rig.profiler.work(_never)
    rig.pool.release(held)
    assert rig.profiler.work(_never)
    assert rig.runner.passes == [_ATTENTION[0], *_ATTENTION[12:]], "what was begun in it is passed over"
