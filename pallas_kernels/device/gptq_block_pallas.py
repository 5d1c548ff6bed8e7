# SPDX-License-Identifier: Apache-2.0
"""`gptq_block` as a Pallas kernel, lowered through Triton.

A program solves all columns of a block for a few rows of one expert. It keeps D in registers, by
columns, so that what the columns so far add to the next one is a sum down the columns: a launch for
a block instead of one for a column.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels import grid_levels
from pallas_kernels.grid_levels import Bits

ROWS = 32  # of a program; 64 spill
_WARPS = 4


def gptq_block(
    target: Float[Array, "E B R"],
    weights: Float[Array, "E B R"],
    scaled: Float[Array, "E B B"],
    grid: Float[Array, "numbers E b R"],
    bits: Bits,
    *,
    interpret: bool = False,
) -> Float[Array, "E B R"]:
    """See `pallas_kernels.gptq_block`.

    Args:
      target, weights, scaled, grid, bits: as there.
      interpret: run on the CPU.
    """
    experts, _, rows = weights.shape
    return pl.pallas_call(
        functools.partial(_kernel, weights.shape, grid.shape[2] > 1, bits),
        out_shape=jax.ShapeDtypeStruct(weights.shape, weights.dtype),
        grid=(experts, pl.cdiv(rows, ROWS)),
        in_specs=[pl.BlockSpec()] * 4,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        name="gptq_block",
    )(target, weights, scaled, grid)


def _kernel(
    shape: tuple[int, ...],
    grid_by_column: bool,
    bits: Bits,
    target_ref,  # [E, B, R]
    weights_ref,  # [E, B, R]
    scaled_ref,  # [E, B, B]
    grid_ref,  # [numbers, E, b, R]
    out_ref,  # [E, B, R]
):
    _, columns, rows = shape
    expert, block = pl.program_id(0), pl.program_id(1)
    row_R = block * ROWS + jnp.arange(ROWS)
    inside_R = row_R < rows
    column_B = jnp.arange(pl.next_power_of_2(columns))
    row_BR = jnp.broadcast_to(row_R[None, :], (len(column_B), ROWS))

    def load(ref, *index):
        return plgpu.load(ref.at[(*index, row_R)], mask=inside_R, other=jnp.float32(1))

    def solve(j, D_BR):
        earlier_B = column_B < j
        scaled_B = plgpu.load(
            scaled_ref.at[expert, j, column_B], mask=earlier_B, other=jnp.float32(0)
        )
        target_R = load(target_ref, expert, j) + jnp.sum(scaled_B[:, None] * D_BR, axis=0)
        at = j if grid_by_column else 0
        grid_R = tuple(load(grid_ref, i, expert, at) for i in range(grid_ref.shape[0]))
        D_R = load(weights_ref, expert, j) - grid_levels.nearest(target_R, grid_R, bits)
        return jnp.where((column_B == j)[:, None], D_R[None, :], D_BR)

    D_BR = jax.lax.fori_loop(0, columns, solve, jnp.zeros((len(column_B), ROWS), jnp.float32))
    stored_BR = inside_R[None, :] & (column_B < columns)[:, None]
    plgpu.store(out_ref.at[expert, column_B[:, None], row_BR], D_BR, mask=stored_BR)
