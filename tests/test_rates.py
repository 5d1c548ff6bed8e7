# SPDX-License-Identifier: Apache-2.0
"""Bits are counted as stored, and the codec takes what the published one was measured to take."""

import codec_oracles as oracle
import numpy as np
import pytest

from pallas_kernels import packed as packed_lib
from qmoe_jax.codec import packing, rates, uniform


def _pack(trits: np.ndarray, codec: str = "qmoe") -> packed_lib.PackedExperts:
    values = np.broadcast_to(np.array([-1, 1], np.float32), (*trits.shape[:2], 2))
    return packing.pack_ternary(trits, values, codec)


@pytest.mark.parametrize(
    ("p0", "entropy", "payload"),
    [
        (0.80, 0.9219, 1.1239),
        (0.85, 0.7598, 0.8762),
        (0.885, 0.6298, 0.7359),
        (0.90, 0.5690, 0.6889),
        (0.92, 0.4822, 0.6389),
        (0.95, 0.3364, 0.5922),
    ],
)
def test_rate_of_independent_trits(p0, entropy, payload):
    """The published code on 1024 x 4096 such trits; here a million of them."""
    assert rates.entropy([p0, (1 - p0) / 2, (1 - p0) / 2]) == pytest.approx(entropy, abs=5e-5)
    trits = oracle.random_trits(0, (1, 256, 4096), p0)
    packed = _pack(trits)
    assert rates.bits_per_weight(packed).payload == pytest.approx(payload, rel=5e-3)
    assert rates.zero_fraction(packed) == np.mean(trits == 0)
    assert rates.entropy(np.bincount(trits.reshape(-1))) == pytest.approx(entropy, rel=1e-2)


@pytest.mark.parametrize("p0", [0.85, 0.885, 0.90, 0.92, 0.95])
def test_trees_are_near_entropy(p0):
    """Rows of 4,096 end in words that are not full, which is counted."""
    trits = oracle.random_trits(0, (1, 256, 4096), p0)
    packed = _pack(trits, "tunstall")
    entropy = rates.entropy(np.bincount(trits.reshape(-1)))
    limit = 1.08 if p0 == 0.95 else 1.06
    assert 1 < rates.bits_per_weight(packed).payload / entropy < limit
    assert rates.zero_fraction(packed) == np.mean(trits == 0)


def test_signs_trees_and_counts_are_counted():
    trits = oracle.random_trits(1, (3, 5, 71), 0.8)
    packed = _pack(trits, "tunstall")
    words = int(np.asarray(packed.row_starts)[:, -1].sum())
    signs = sum(-(-int(n) // 16) for n in (trits != 0).sum((1, 2)))
    counted = rates.bits_per_weight(packed_lib.join([packed], slab_words=4096))
    lengths = 16 * 15 + (8 + 32) * 3
    assert counted == rates.StoredBits(3 * 5 * 71, 16 * (words + signs), lengths, 32 * 15)


def test_zeros_alone_take_the_floor():
    counted = rates.bits_per_weight(_pack(np.zeros((1, 16, 4096), np.uint8)))
    assert counted.payload == 147 * 16 / 4096  # a word holds at most 28 weights
    assert counted.total == (147 * 16 + 16 + 32) / 4096


def test_everything_stored_is_counted_and_padding_is_not():
    trits = oracle.random_trits(1, (3, 5, 71), 0.8)
    packed = _pack(trits)
    words = sum(len(oracle.encode_row(row)) for row in trits.reshape(15, 71))
    counted = rates.bits_per_weight(packed_lib.join([packed], slab_words=4096))
    assert counted == rates.StoredBits(3 * 5 * 71, 16 * words, 16 * 15, 32 * 15)
    assert counted.total == (16 * words + 48 * 15) / (15 * 71)


def test_long_rows_need_longer_counts():
    counted = rates.bits_per_weight(_pack(np.ones((1, 1, 2**19), np.uint8)))
    assert counted.codes // 16 >= 2**16
    assert counted.row_lengths == 32


def test_uniform_levels():
    grid = np.ones((2, 3, 2), np.float32)
    packed = uniform.pack_uniform(np.zeros((2, 3, 40), np.uint8), grid, grid, 3, group_size=20)
    counted = rates.bits_per_weight(packed)
    assert counted == rates.StoredBits(2 * 3 * 40, 2 * 3 * 2 * 3 * 32, 0, 2 * 3 * 2 * (16 + 8))


def test_entropy_of_counts():
    assert rates.entropy([5, 5]) == 1
    assert rates.entropy([7, 0, 0]) == 0
    for counts in ([0, 0], [-1, 2]):
        with pytest.raises(ValueError, match="non-negative"):
            rates.entropy(counts)
