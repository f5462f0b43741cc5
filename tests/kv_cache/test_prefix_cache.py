"""Hash chains and the table between hashes and blocks."""

from __future__ import annotations

import numpy as np
import pytest

from max_ray.interfaces import PromptImage, RequestID, TextContext, TokenBuffer
from max_ray.kv_cache import PrefixCache, commit_hashes, extend_block_hashes, hash_blocks, lookup_hashes


def context(tokens: list[int], **kwargs: object) -> TextContext:
    return TextContext(request_id=RequestID("r"), tokens=TokenBuffer(tokens), max_length=1000, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_only_full_blocks_are_hashed(page_size: int, extra: int) -> None:
    length = 3 * page_size + extra
    assert len(hash_blocks(list(range(length)), page_size)) == length // page_size


def test_the_chain_tells_prefixes_apart() -> None:
    a = hash_blocks([1, 2, 3, 4, 5, 6], 2)
    b = hash_blocks([9, 2, 3, 4, 5, 6], 2)
    assert len(set(a + b)) == 6
    assert hash_blocks([1, 2, 3, 4, 7, 7], 2)[:2] == a[:2]
    assert hash_blocks([5, 6], 2, parent=a[1]) == a[2:]
    assert hash_blocks([1, 2], 2, seed=b"other model") != a[:1]
    assert all(len(key) == 16 for key in a)
    assert hash_blocks([], 2) == []


def test_hashes_do_not_depend_on_the_array_type() -> None:
    assert hash_blocks(np.array([1, 2, 3, 4], dtype=np.int32), 2) == hash_blocks([1, 2, 3, 4], 2)


def test_extending_piece_by_piece_equals_hashing_at_once() -> None:
    tokens = list(range(40))
    whole = extend_block_hashes(context(tokens), 4, 40)
    pieces = context(tokens)
    for length in (3, 4, 5, 11, 12, 30, 40, 7):
        extend_block_hashes(pieces, 4, length)
    assert pieces.block_hashes == whole
    assert len(whole) == 10
    assert extend_block_hashes(context(tokens, model_name="a"), 4, 40) != whole


@pytest.mark.parametrize(("length", "expected"), [(3, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_a_lookup_leaves_the_last_token(length: int, expected: int) -> None:
    assert len(lookup_hashes(context(list(range(length))), 4)) == expected


def test_no_lookup_where_a_hit_would_be_wrong() -> None:
    tokens = list(range(20))
    assert lookup_hashes(context(tokens, log_probabilities=1, log_probabilities_echo=True), 4) == []


@pytest.mark.parametrize(("processed", "first", "expected"), [(3, 0, 0), (4, 0, 1), (9, 0, 2), (9, 1, 1), (9, 2, 0)])
def test_commit_takes_only_computed_full_blocks(processed: int, first: int, expected: int) -> None:
    row = context(list(range(20)))
    row.processed_length = processed
    hashes = commit_hashes(row, 4, first)
    assert hashes == hash_blocks(list(range(20)), 4)[first : first + expected]


def test_lookup_ends_at_the_first_miss() -> None:
    cache = PrefixCache()
    a, b, c = hash_blocks([1, 2, 3], 1)
    cache.insert(a, 7)
    cache.insert(c, 9)
    assert cache.lookup([a, b, c]) == [7]
    assert cache.insert(a, 8) == 7, "the first block stays"
    assert 8 not in cache
    assert cache.evict(7)
    assert not cache.evict(7)
    assert cache.lookup([a]) == []
    cache.assert_invariants()
    cache.clear()
    assert len(cache) == 0


def image(start: int, rows: int, columns: int, digest: int) -> PromptImage:
    nothing = np.zeros(3, dtype=np.float32)
    pixels = np.zeros((1, 1, 3), dtype=np.uint8)
    return PromptImage(pixels, nothing, nothing, start, rows, columns, bytes([digest]) * 16)


@pytest.mark.parametrize(("start", "first_that_differs"), [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2)])
def test_blocks_from_the_image_on_are_those_of_its_pixels(start: int, first_that_differs: int) -> None:
    """Blocks of 4 tokens; the image has 6."""
    one, same, other, none = (context(list(range(20))) for _ in range(4))
    one.images, same.images, other.images = ((image(start, 2, 3, digest),) for digest in (1, 1, 2))
    hashes = lookup_hashes(one, 4)
    assert len(hashes) == 4
    assert hashes == lookup_hashes(same, 4)
    for different in (other, none):
        equal = [a == b for a, b in zip(hashes, lookup_hashes(different, 4), strict=True)]
        assert equal == [number < first_that_differs for number in range(4)]


def test_hashes_of_images_do_not_depend_on_when_they_are_taken() -> None:
    whole, bit_by_bit = (context(list(range(40))) for _ in range(2))
    whole.images = bit_by_bit.images = (image(3, 2, 3, 1), image(9, 1, 1, 2), image(20, 4, 4, 1))
    for processed in (3, 9, 10, 23, 36):
        bit_by_bit.processed_length = processed
        commit_hashes(bit_by_bit, 4, 0)
    assert lookup_hashes(whole, 4) == lookup_hashes(bit_by_bit, 4)


def test_the_order_of_two_images_counts() -> None:
    one, other = context(list(range(9))), context(list(range(9)))
    one.images, other.images = (image(0, 1, 2, 1), image(2, 1, 2, 2)), (image(0, 1, 2, 2), image(2, 1, 2, 1))
    assert lookup_hashes(one, 4)[0] != lookup_hashes(other, 4)[0]
