"""The block pool: references, prefix cache, eviction order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.kv.block_pool import ROOT_KEY, BlockPool, OutOfBlocksError, block_key


def _keys(*chunks: tuple[int, ...]) -> list[bytes]:
    keys, parent = [], ROOT_KEY
    for chunk in chunks:
        parent = block_key(parent, chunk)
        keys.append(parent)
    return keys


def test_key_depends_on_everything_before_it() -> None:
    assert _keys((1, 2), (3, 4))[1] != _keys((9, 2), (3, 4))[1]
    assert _keys((1, 2), (3, 4)) == _keys((1, 2), (3, 4))


def test_cached_blocks_are_found_shared_and_evicted_last() -> None:
    pool = BlockPool(4, 2)
    keys = _keys((1, 2), (3, 4))
    first = pool.allocate(2)
    for block, key in zip(first, keys, strict=True):
        pool.publish(block, key)
    assert pool.match_prefix(keys) == first  # shared while in use
    pool.release(first)
    pool.release(first)
    assert pool.num_free == 4
    assert pool.num_cached == 2
    others = pool.allocate(2)
    assert not set(others) & set(first), "blocks without content go first"
    assert pool.match_prefix(keys) == first
    pool.release(first)
    # The tail of a sequence is evicted before its head: a head alone is still useful, a tail is not.
    pool.allocate(1)
    assert pool.match_prefix(keys) == first[:1]
    pool.check()


def test_nothing_is_taken_when_blocks_run_out() -> None:
    pool = BlockPool(2, 2)
    with pytest.raises(OutOfBlocksError):
        pool.allocate(3)
    assert pool.num_free == 2


def test_double_release_is_an_error() -> None:
    pool = BlockPool(2, 2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(ValueError, match="not in use"):
        pool.release(blocks)


def test_reset_forgets_content_but_not_users() -> None:
    pool = BlockPool(3, 2)
    keys = _keys((1, 2))
    blocks = pool.allocate(1)
    pool.publish(blocks[0], keys[0])
    pool.reset_cache()
    assert pool.match_prefix(keys) == []
    assert pool.num_free == 2
    pool.release(blocks)
    pool.check()


@given(st.lists(st.tuples(st.sampled_from("amrp"), st.integers(0, 5)), max_size=60))
def test_invariants_hold_over_random_use(actions: list[tuple[str, int]]) -> None:
    pool = BlockPool(6, 2)
    held: list[list[int]] = []
    chains = [_keys((n, n), (n, n + 1), (n, n + 2)) for n in range(6)]
    for action, n in actions:
        if action == "a" and pool.num_free >= n:
            held.append(pool.allocate(n))
        elif action == "m":
            held.append(pool.match_prefix(chains[n]))
        elif action == "r" and held:
            pool.release(held.pop(n % len(held)))
        elif action == "p" and held:
            for block, key in zip(held[n % len(held)], chains[n], strict=False):
                pool.publish(block, key)
        pool.check()
    for blocks in held:
        pool.release(blocks)
    pool.check()
    assert pool.num_free == 6
