# SPDX-License-Identifier: Apache-2.0
"""Bit planes of 2, 3 and 4 bits."""

import dataclasses

import codec_oracles as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_jax.codec import uniform


def _grid(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.random(shape, np.float32), rng.integers(0, 4, shape).astype(np.float32)


def _levels(seed: int, shape: tuple[int, int, int], bits: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint8)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([(1, 1, 1), (2, 1, 31), (3, 2, 32), (1, 2, 33), (2, 3, 70)]),
    st.sampled_from(uniform.BITS),
    st.integers(0, 2**32 - 1),
)
def test_round_trip_and_layout(shape, bits, seed):
    levels = _levels(seed, shape, bits)
    packed = uniform.pack_uniform(levels, *_grid((*shape[:2], 1)), bits)
    assert packed.codes.shape == (*shape[:2], -(-shape[2] // 32), bits)
    np.testing.assert_array_equal(uniform.unpack_uniform(packed), levels)
    row = np.asarray(packed.codes)[-1, -1]
    np.testing.assert_array_equal(oracle.plane_levels(row, shape[2]), levels[-1, -1])


def test_a_range_of_experts():
    levels = _levels(1, (4, 2, 40), 3)
    packed = uniform.pack_uniform(levels, *_grid((4, 2, 1)), 3)
    np.testing.assert_array_equal(uniform.unpack_uniform(packed, 1, 2), levels[1:3])
    traced = jax.jit(lambda record, first: uniform.unpack_uniform(record, first, 1))
    np.testing.assert_array_equal(traced(packed, jnp.int32(3)), levels[3:])
    with pytest.raises(ValueError, match=r"\[3, 5\) are not a part of 4"):
        uniform.unpack_uniform(packed, 3, 2)


@pytest.mark.parametrize("group_size", [uniform.WHOLE_ROW, 4, 7])
def test_weights_of_groups(group_size):
    levels = _levels(2, (2, 3, 10), 2)
    size = 10 if group_size == uniform.WHOLE_ROW else group_size
    scale, zero = _grid((2, 3, -(-10 // size)))
    packed = uniform.pack_uniform(levels, scale, zero, 2, group_size)
    weights = uniform.dequantize_uniform(
        uniform.unpack_uniform(packed),
        jnp.asarray(packed.scale),
        jnp.asarray(packed.zero),
        group_size,
    )
    for column in range(10):
        group = column // size
        expected = scale[:, :, group] * (
            levels[:, :, column].astype(np.float32) - zero[:, :, group]
        )
        np.testing.assert_array_equal(weights[:, :, column], expected)


def test_bad_input():
    levels = _levels(2, (2, 3, 10), 3)
    levels[0, 0, 0] = 7
    scale, zero = _grid((2, 3, 1))
    with pytest.raises(ValueError, match="`bits` must be one of"):
        uniform.pack_uniform(levels, scale, zero, 5)
    with pytest.raises(ValueError, match="of 2 bits must be below 4, got 7"):
        uniform.pack_uniform(levels, scale, zero, 2)
    with pytest.raises(ValueError, match=r"`scale` of .* must be \(2, 3, 3\), got \(2, 3, 1\)"):
        uniform.pack_uniform(levels, scale, zero, 3, group_size=4)
    with pytest.raises(ValueError, match="`group_size` positive or -1"):
        uniform.pack_uniform(levels, scale, zero, 3, group_size=0)
    packed = uniform.pack_uniform(levels, scale, zero, 3)
    with pytest.raises(ValueError, match="`codes` of"):
        uniform.validate(dataclasses.replace(packed, bits=4))
