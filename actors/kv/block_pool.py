"""Ownership of KV blocks: reference counts, and the prefix cache over full, committed blocks.

The pool knows ids only; the tensors live in the model runner. A block with a content key stays findable
after its last user is gone, until its slot is needed: the free list is in least-recently-used order.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

BlockKey = bytes
ROOT_KEY: BlockKey = b""


class OutOfBlocksError(Exception):
    """The pool has fewer free blocks than asked for; nothing was taken."""


def block_key(parent: BlockKey, token_ids: Sequence[int]) -> BlockKey:
    """Content key of a full block: a digest over all tokens from the start of the sequence."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens. Not thread-safe: the engine thread owns it."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        if num_blocks < 1:
            raise ValueError("a KV pool needs at least one block")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(num_blocks))
        self._block_of: dict[BlockKey, int] = {}
        self._key_of: dict[int, BlockKey] = {}

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds; some may still be findable in the prefix cache."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Free blocks that still carry findable content."""
        return sum(1 for block in self._free if block in self._key_of)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, evicting the least recently used cached content. Raises OutOfBlocksError."""
        if count > len(self._free):
            raise OutOfBlocksError(f"{count} blocks asked, {len(self._free)} free")
        return [self._take_oldest() for _ in range(count)]

    def _take_oldest(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._refs[block] = 1
        return block

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]

    def match_prefix(self, keys: Iterable[BlockKey]) -> list[int]:
        """Blocks that hold the longest cached run of `keys`; the caller becomes a user of each."""
        matched: list[int] = []
        if not self.prefix_caching:
            return matched
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            if self._refs[block] == 0:
                del self._free[block]
            self._refs[block] += 1
            matched.append(block)
        return matched

    def publish(self, block: int, key: BlockKey) -> None:
        """Make a full, committed block findable. The first block with a key keeps it."""
        if self.prefix_caching and key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one use of each block. Later blocks of a sequence are evicted before earlier ones."""
        for block in reversed(blocks):
            if self._refs[block] <= 0:
                raise ValueError(f"block {block} is not in use")
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free[block] = None
                if block not in self._key_of:
                    self._free.move_to_end(block, last=False)

    def reset_cache(self) -> None:
        """Forget all findable content; blocks in use stay with their users."""
        self._block_of.clear()
        self._key_of.clear()

    def check(self) -> None:
        """Assert the pool's invariants, for tests."""
        assert all((refs == 0) == (block in self._free) for block, refs in enumerate(self._refs))
        assert all(self._key_of[block] == key for key, block in self._block_of.items())
