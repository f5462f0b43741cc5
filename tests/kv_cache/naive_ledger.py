"""The slow truth beside PagedKVCacheManager: what a ledger promises, computed by looking at everything each time.

It does not choose block ids. It keeps whole token prefixes instead of hashes, and predicts how many blocks a request
holds, how many are free, and how many leading tokens a newcomer may reuse when nothing was evicted.
"""

from __future__ import annotations


class NaiveLedger:
    """Tables of blocks, as the manager gave them; prefixes as tuples of tokens."""

    def __init__(self, num_blocks: int, page_size: int) -> None:
        self.num_blocks = num_blocks
        self.page_size = page_size
        self.tables: dict[str, list[int]] = {}
        self.contents: dict[int, tuple[int, ...]] = {}

    @property
    def num_free(self) -> int:
        return self.num_blocks - len({block for table in self.tables.values() for block in table})

    def blocks_for(self, num_tokens: int) -> int:
        return (num_tokens + self.page_size - 1) // self.page_size

    def cached_blocks(self, tokens: list[int]) -> int:
        """How many full blocks of `tokens`, its last token left out, lie somewhere with all that comes before them."""
        known = set(self.contents.values())
        count = 0
        while (count + 1) * self.page_size < len(tokens) and tuple(tokens[: (count + 1) * self.page_size]) in known:
            count += 1
        return count

    def take(self, request: str, blocks: list[int], num_reused: int, tokens: list[int]) -> None:
        """The manager gave `blocks` to `request`: the reused ones must hold its tokens, the others lose theirs."""
        table = self.tables.setdefault(request, [])
        in_use = {block for other in self.tables.values() for block in other}
        for index, block in enumerate(blocks):
            if index < num_reused:
                assert self.contents[block] == tuple(tokens[: (index + 1) * self.page_size]), "a wrong prefix"
            else:
                assert block not in in_use, "a block in use was given away"
                self.contents.pop(block, None)
        table += blocks

    def commit(self, request: str, tokens: list[int], processed: int) -> None:
        """The first `processed` tokens are computed: full blocks may be found, unless others hold them already."""
        known = set(self.contents.values())
        for index in range(processed // self.page_size):
            prefix = tuple(tokens[: (index + 1) * self.page_size])
            if prefix not in known:
                self.contents[self.tables[request][index]] = prefix

    def release(self, request: str) -> None:
        self.tables.pop(request, None)
