"""BlockPool: which blocks are free, and how many requests share each of the others. For PagedKVCacheManager only.

A block is in exactly one of two states:

    used  (reference count >= 1)   not in the free list
    free  (reference count == 0)   in the free list; may still hold keys and values that the prefix cache knows

The free list is ordered: blocks are handed out from its front (least recently used first). Every verb is O(1).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping


class BlockPool:
    """Blocks 0 .. num_blocks - 1 with reference counts."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 1, f"a KV cache needs at least one block, not {num_blocks}"
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def is_free(self, block: int) -> bool:
        return self._refs[block] == 0

    def alloc(self) -> int:
        """Takes the least recently used free block, with one reference. Whatever it held is lost."""
        assert self._free, "alloc from an empty pool: ask for num_free first"
        block, _ = self._free.popitem(last=False)
        self._refs[block] = 1
        return block

    def touch(self, block: int) -> None:
        """One more reference to a block; a free one comes back into use with its contents."""
        if self._refs[block] == 0:
            del self._free[block]
        self._refs[block] += 1

    def free(self, block: int, *, keep: bool) -> None:
        """One reference less. The last one frees the block: with `keep` it is reused last, without it first."""
        assert self._refs[block] > 0, f"block {block} was freed twice"
        self._refs[block] -= 1
        if self._refs[block] == 0:
            self._free[block] = None
            self._free.move_to_end(block, last=keep)

    def assert_invariants(self, expected_refs: Mapping[int, int]) -> None:
        """Reference counts are exactly `expected_refs` (missing = 0), and the free list is the blocks with none."""
        for block, refs in enumerate(self._refs):
            expected = expected_refs.get(block, 0)
            assert refs == expected, f"block {block} has {refs} references, not {expected}"
            assert (refs == 0) == (block in self._free), f"block {block} has {refs} references and a wrong place"
        assert len(self._refs) == self.num_blocks
