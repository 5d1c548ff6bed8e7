# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from pallas_kernels import grid_levels
from qmoe_jax.quantization import grids


def test_ternary_ties_go_to_zero_and_ranges_include_zero():
    rows = np.array([[-1.0, -0.5, 0.5, 1.0], [0.25, 0.5, 0.75, 1.0], [0, 0, 0, 0]], np.float32)
    grid = grids.fit(jnp.array(rows.T), "ternary", False)
    np.testing.assert_array_equal(grid, [[-1, 0, -1], [1, 1, 1]])
    levels = grid_levels.quantize(
        jnp.array(rows.T), jnp.broadcast_to(grid[:, None], (2, 4, 3)), "ternary"
    )
    np.testing.assert_array_equal(levels.T, [[1, 0, 0, 2], [0, 0, 2, 2], [0, 0, 0, 0]])


@pytest.mark.parametrize("bits", grids.BITS)
def test_agrees_with_the_oracle(bits):
    rows = np.random.default_rng(0).normal(size=(32, 50)).astype(np.float32)
    grid = grids.fit(jnp.array(rows.T), bits, False)
    wide = jnp.broadcast_to(grid[:, None], (2, 50, 32))
    values = grid_levels.dequantize(grid_levels.quantize(jnp.array(rows.T), wide, bits), wide, bits)
    exact = oracles.fit_grid(rows.astype(np.float64), bits)
    expected = np.stack([oracles.to_grid(column, exact, bits) for column in rows.T])
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", grids.BITS)
def test_stored_grids_are_bfloat16_values(bits):
    rows = np.random.default_rng(1).normal(size=(40, 16)).astype(np.float32)
    grid = grids.fit(jnp.array(rows), bits, True)
    np.testing.assert_array_equal(grid, grid.astype(jnp.bfloat16).astype(jnp.float32))


def test_parse_bits_knows_the_papers_name_and_refuses_others():
    assert grids.parse_bits(1.5) == grids.parse_bits("ternary") == "ternary"
    assert grids.parse_bits(3) == 3
    with pytest.raises(ValueError, match="BITS is 5"):
        grids.parse_bits(5)
