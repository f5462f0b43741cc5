"""Philox against its published vectors, and what the sampler needs of the draws."""

from __future__ import annotations

import numpy as np
import pytest

from max_ray.engine.sampling.philox import philox4x32, uniforms

# counter, key, result: the known answers that the authors of Philox publish for philox4x32 with 10 rounds
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], dtype=np.uint32)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, result: str) -> None:
    np.testing.assert_array_equal(philox4x32(words(counter), words(key)), words(result))


def test_leading_axes_are_independent() -> None:
    counters = np.stack([words(counter) for counter, _, _ in KNOWN_ANSWERS])
    keys = np.stack([words(key) for _, key, _ in KNOWN_ANSWERS])
    np.testing.assert_array_equal(philox4x32(counters, keys), np.stack([words(r) for _, _, r in KNOWN_ANSWERS]))


def test_uniforms_use_seed_as_key_and_number_as_counter() -> None:
    seed, number = 0x299F31D0A4093822, 0x1_0000_0002
    first_word = philox4x32(words("00000002 00000001 0 0"), words("a4093822 299f31d0"))[0]
    assert uniforms([seed], np.array([number]), 1)[0, 0] == first_word / 2**32


def test_a_draw_depends_on_seed_and_number_only() -> None:
    alone = uniforms([7], np.array([0]), 40)[0]
    batch = uniforms([3, 7, 7], np.array([5, 0, 30]), 40)
    np.testing.assert_array_equal(batch[1], alone)
    np.testing.assert_array_equal(batch[2][:10], alone[30:])
    assert not np.array_equal(batch[0], batch[1])


@pytest.mark.parametrize("seed", [0, 1, -1, -(2**63), 2**63 - 1, 2**63, 2**64 - 1])
def test_extreme_seeds(seed: int) -> None:
    draws = uniforms([seed], np.array([0]), 1000)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert 0.45 < draws.mean() < 0.55
    np.testing.assert_array_equal(draws, uniforms([seed % 2**64], np.array([0]), 1000))


def test_draws_are_uniform() -> None:
    counts = np.bincount((uniforms(range(1000), np.zeros(1000, dtype=np.int64), 100) * 64).astype(int).ravel())
    expected = 100_000 / 64
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert 63 - 5 * np.sqrt(126) < chi_square < 63 + 5 * np.sqrt(126)  # mean and deviation at 63 degrees of freedom
