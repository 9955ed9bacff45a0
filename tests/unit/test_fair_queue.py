"""Fair queueing of a draft worker: shares by weight, order within a stream, nothing saved up."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.draft_worker.fair_queue import FairQueue

Item = tuple[int, int]


@given(
    weights=st.tuples(*[st.sampled_from((0.5, 1.0, 3.0))] * 3),
    sizes=st.lists(st.tuples(*[st.integers(1, 16)] * 3), min_size=40, max_size=40),
    limit=st.integers(1, 64),
)
def test_streams_with_work_get_shares_by_weight(
    weights: tuple[float, ...], sizes: list[tuple[int, ...]], limit: int
) -> None:
    queue: FairQueue[Item] = FairQueue()
    for stream, weight in enumerate(weights):
        queue.attach(stream, weight)
        for row in sizes:
            queue.put(stream, row[stream], (stream, row[stream]))
    served: Counter[int] = Counter()
    while all(served[s] < sum(row[s] for row in sizes) for s in range(3)):
        (batch_item, *_) = batch = queue.take(limit)
        assert sum(size for _, size in batch) <= max(limit, batch_item[1])
        for stream, size in batch:
            served[stream] += size
        # Fairness bound of start-time fair queueing: one item of each, and here one batch.
        for a in range(3):
            for b in range(3):
                unfair = abs(served[a] / weights[a] - served[b] / weights[b])
                assert unfair <= (16 + limit) / weights[a] + (16 + limit) / weights[b]


def test_order_within_a_stream_and_items_that_cost_nothing() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.attach(1, 1.0)
    for name, tokens in (("a", 5), ("b", 0), ("c", 0), ("d", 4)):
        queue.put(1, tokens, name)
    assert len(queue) == 4
    assert queue.take(5) == ["a", "b", "c"]
    assert queue.take(5) == ["d"]
    assert queue.take(5) == []


def test_idle_time_is_not_saved_up() -> None:
    queue: FairQueue[int] = FairQueue()
    for stream in (1, 2):
        queue.attach(stream, 1.0)
    for _ in range(100):
        queue.put(1, 4, 1)
        assert queue.take(4) == [1]
    for stream in (1, 2) * 10:
        queue.put(stream, 4, stream)
    order = [item for _ in range(20) for item in queue.take(4)]
    assert Counter(order[:10]) == Counter({1: 5, 2: 5})


def test_a_stream_that_ends_leaves_nothing() -> None:
    queue: FairQueue[int] = FairQueue()
    queue.attach(1, 2.0)
    queue.put(1, 100, 1)
    queue.put(2, 1, 2)
    queue.detach(1)
    assert (len(queue), queue.take(1000)) == (1, [2])
    queue.put(1, 1, 1)
    queue.put(2, 1, 2)
    assert sorted(queue.take(2)) == [1, 2], "an old debt is forgotten"


@pytest.mark.parametrize("limit", [1, 7])
def test_an_item_beyond_the_limit_goes_alone(limit: int) -> None:
    queue: FairQueue[str] = FairQueue()
    queue.put(1, 50, "huge")
    queue.put(2, 1, "small")
    assert queue.take(limit) == ["huge"]
    assert queue.take(limit) == ["small"]
