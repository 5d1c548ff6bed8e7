# SPDX-License-Identifier: Apache-2.0
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gptq_block, grid_levels
from pallas_kernels.device import gptq_block_pallas
from qmoe_jax.quantization import columns, gptq, grids
from qmoe_jax.quantization.gptq import GptqOptions

KINDS = [("ternary", False), ("ternary", True), (2, False), (4, False)]  # own thresholds?
SHAPES = [(1, 8, 1), (2, 128, 50), (3, 40, 33), (1, 128, 96)]  # experts, columns, rows


def inputs(shape, bits, by_column: bool, thresholds: bool = False) -> tuple[Any, ...]:
    E, B, _ = shape
    generator = np.random.default_rng(0)
    weights = generator.standard_normal(shape).astype(np.float32)
    target = weights + 0.1 * generator.standard_normal(shape).astype(np.float32)
    scaled = np.tril(0.1 * generator.standard_normal((E, B, B))).astype(np.float32)
    grid = grids.fit(jnp.asarray(weights), bits, True)[:, :, None]
    if by_column:
        scale = jnp.asarray(generator.uniform(0.5, 2, (1, 1, B, 1)), jnp.float32)
        grid = jnp.broadcast_to(grid, (2, *shape)) * (scale if bits == "ternary" else 1)
    if thresholds:
        share = jnp.asarray(generator.uniform(0.2, 0.9, grid.shape), jnp.float32)
        grid = jnp.concatenate([grid, share * grid])
    return jnp.asarray(target), jnp.asarray(weights), jnp.asarray(scaled), grid


def column_by_column(target, weights, scaled, grid, *, bits):
    """In float64, as the definition says."""
    target, weights, scaled = (np.asarray(a, np.float64) for a in (target, weights, scaled))
    D = np.zeros_like(weights)
    for j in range(weights.shape[1]):
        value = target[:, j] + np.einsum("ei,eir->er", scaled[:, j, :j], D[:, :j])
        at = jnp.asarray(grid[:, :, min(j, grid.shape[2] - 1)])
        D[:, j] = weights[:, j] - grid_levels.nearest(jnp.asarray(value, jnp.float32), at, bits)
    return D


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize(("bits", "thresholds"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_and_kernel_solve_every_column(shape, bits, thresholds, by_column):
    given = inputs(shape, bits, by_column, thresholds)
    expected = column_by_column(*given, bits=bits)
    solve = functools.partial(gptq_block.gptq_block_xla, bits=bits)
    by_xla = jax.jit(solve)(*given)
    solve = functools.partial(gptq_block_pallas.gptq_block, bits=bits, interpret=True)
    by_pallas = jax.jit(solve)(*given)
    np.testing.assert_allclose(by_xla, expected, atol=1e-5)
    np.testing.assert_allclose(by_pallas, expected, atol=1e-5)


def test_the_goldens_level_for_level_through_the_kernel(data_dir, monkeypatch):
    """All of GPTQ, with the kernel for its blocks."""
    interpreted = functools.partial(gptq_block_pallas.gptq_block, interpret=True)
    with np.load(data_dir / "qmoe" / "gptq.npz") as file:
        arrays = dict(file)
    name = next(key.removesuffix("/W") for key in arrays if key.endswith("/W"))
    kernel = jnp.asarray(arrays[f"{name}/W"]).swapaxes(-1, -2)
    hessian = jnp.asarray(arrays[f"{name}/H"])
    for bits in ("ternary", 2):
        for group_size in (None, 32):
            options = GptqOptions(group_size=group_size)
            expected = gptq.gptq(kernel, hessian, bits=bits, options=options)
            with monkeypatch.context() as patch:
                patch.setattr(columns, "gptq_block", interpreted)
                jax.clear_caches()
                found = gptq.gptq(kernel, hessian, bits=bits, options=options)
            jax.clear_caches()
            np.testing.assert_array_equal(found.levels, expected.levels)


@pytest.mark.slow
def test_a_whole_matrix_through_the_kernel(monkeypatch):
    """wi of switch-base: nearly all levels are equal, and the error is the same."""
    generator = np.random.default_rng(0)
    mix = generator.standard_normal((768, 768)) / np.sqrt(768)
    tokens = generator.standard_normal((1536, 768)) @ (np.eye(768) + 0.3 * mix)
    hessian = jnp.asarray(tokens.T @ tokens, jnp.float32)[None]
    kernel = jnp.asarray(generator.standard_normal((1, 768, 3072)), jnp.float32)
    expected = gptq.gptq(kernel, hessian, bits="ternary")
    interpreted = functools.partial(gptq_block_pallas.gptq_block, interpret=True)
    monkeypatch.setattr(columns, "gptq_block", interpreted)
    jax.clear_caches()
    found = gptq.gptq(kernel, hessian, bits="ternary")
    jax.clear_caches()
    assert np.mean(np.asarray(found.levels == expected.levels)) >= 0.9999
    np.testing.assert_allclose(found.error, expected.error, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["pallas", "triton"])
@pytest.mark.parametrize("bits", ["ternary", 2, 4])
def test_a_large_block_on_the_device(bits, implementation):
    given = inputs((16, 128, 1024), bits, False)
    solve = functools.partial(gptq_block.gptq_block, bits=bits)
    by_xla = jax.jit(functools.partial(solve, implementation="xla"))(*given)
    found = jax.jit(functools.partial(solve, implementation=implementation))(*given)
    assert np.mean(np.abs(found - by_xla) < 1e-4) > 0.9999


@pytest.mark.parametrize(("numbers", "bits"), [(3, "ternary"), (4, 2)])
def test_grids_of_other_numbers_are_refused(numbers, bits):
    array = jnp.zeros((1, 8, 4))
    with pytest.raises(ValueError, match=f"grids of {numbers} numbers; expected 2"):
        gptq_block.gptq_block(
            *(array, array, jnp.zeros((1, 8, 8)), jnp.zeros((numbers, 1, 1, 4))), bits
        )


@pytest.mark.parametrize(("columns", "grid"), [(12, 1), (16, 2)])
def test_blocks_of_other_columns_are_refused(columns, grid):
    array = jnp.zeros((1, columns, 4))
    with pytest.raises(ValueError, match="expected a multiple of 8, and one grid or"):
        gptq_block.gptq_block(
            *(array, array, jnp.zeros((1, columns, columns)), jnp.zeros((2, 1, grid, 4))),
            "ternary",
        )
