"""The prefix cache: from the hash of a block's tokens, and of all tokens before them, to the block that holds them.

Only full blocks have a hash. The hash of block i is blake2b(hash of block i - 1, tokens of block i, digests of the
images of which a part is in block i), so equal hashes mean equal prefixes, and a lookup walks the chain until the first
miss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from max_ray.interfaces import TextContext
from max_ray.interfaces.image import images_within

_HASH_BYTES = 16


def hash_blocks(
    tokens: npt.ArrayLike,
    page_size: int,
    parent: bytes = b"",
    seed: bytes = b"",
    contents: Callable[[int], bytes] | None = None,
) -> list[bytes]:
    """Chained hashes of the full blocks of `tokens` [n]: n // page_size of them, 16 bytes each.

    parent: hash of the block before `tokens`; empty at the start of a sequence. seed: separates caches that must not
    share (another model, a tenant's salt); it enters at the start of the chain only.
    contents: from the number of a block among these to what its tokens stand for beside themselves (images).
    """
    array = np.asarray(tokens, dtype="<i8")
    num_blocks = len(array) // page_size
    raw = array[: num_blocks * page_size].tobytes()
    last = parent or blake2b(seed, digest_size=_HASH_BYTES, person=b"max_ray kv").digest()
    hashes = []
    for number, start in enumerate(range(0, len(raw), page_size * 8)):
        block = last + raw[start : start + page_size * 8] + (contents(number) if contents is not None else b"")
        last = blake2b(block, digest_size=_HASH_BYTES).digest()
        hashes.append(last)
    return hashes


def extend_block_hashes(context: TextContext, page_size: int, num_tokens: int) -> list[bytes]:
    """Makes `context.block_hashes` cover the full blocks of its first `num_tokens` tokens, and returns that list.

    It may already be longer. Only new blocks are hashed. The chain is seeded with the model's name and the request's
    salt, so requests with different salts share no block.
    """
    hashes = context.block_hashes
    start = len(hashes) * page_size
    if num_tokens - start >= page_size:
        parent = hashes[-1] if hashes else b""
        hashes += hash_blocks(
            context.tokens.all[start:num_tokens],
            page_size,
            parent=parent,
            seed=_seed(context),
            contents=_image_digests(context, page_size, start) if context.images else None,
        )
    return hashes


def _seed(context: TextContext) -> bytes:
    salt = context.cache_salt and f"\0{context.cache_salt}"
    return (context.model_name + salt).encode("utf-8", "surrogatepass")


def _image_digests(context: TextContext, page_size: int, first_token: int) -> Callable[[int], bytes]:
    """See hash_blocks: the digests of the images in a block, of those that begin at `first_token`."""

    def of_block(number: int) -> bytes:
        start = first_token + number * page_size
        return b"".join(image.digest for image in images_within(context.images, start, start + page_size))

    return of_block


def lookup_hashes(context: TextContext, page_size: int) -> list[bytes]:
    """The hashes under which a prefix of `context` may be found: never its last token, which must run.

    Nothing where a hit would be wrong: `echo` needs the logits of every prompt token. (Images change keys and values
    without changing tokens; they are in the hashes.)
    """
    if context.log_probabilities_echo:
        return []
    num_tokens = len(context.tokens) - 1
    return extend_block_hashes(context, page_size, num_tokens)[: num_tokens // page_size]


def commit_hashes(context: TextContext, page_size: int, first_block: int) -> list[bytes]:
    """Hashes of the full blocks from `first_block` on whose keys and values are computed."""
    num_full = context.processed_length // page_size
    if num_full <= first_block:
        return []
    return extend_block_hashes(context, page_size, num_full * page_size)[first_block:num_full]


class PrefixCache:
    """A one-to-one table between hashes and blocks. Knows nothing of reference counts."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._block_of)

    def __contains__(self, block: int) -> bool:
        return block in self._hash_of

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix of `hashes`."""
        blocks = []
        for key in hashes:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def insert(self, key: bytes, block: int) -> int:
        """The block that serves `key` from now on: `block`, or another one that held the same tokens before."""
        holder = self._block_of.setdefault(key, block)
        if holder == block:
            assert self._hash_of.get(block, key) == key, f"block {block} changed its contents while it was cached"
            self._hash_of[block] = key
        return holder

    def evict(self, block: int) -> bool:
        """Forgets a block; False when it was not cached."""
        key = self._hash_of.pop(block, None)
        if key is None:
            return False
        del self._block_of[key]
        return True

    def clear(self) -> None:
        self._block_of.clear()
        self._hash_of.clear()

    def assert_invariants(self) -> None:
        inverse = {block: key for key, block in self._block_of.items()}
        assert len(inverse) == len(self._block_of), "two hashes share a block"
        assert inverse == self._hash_of, "hash -> block and block -> hash differ"
