# SPDX-License-Identifier: Apache-2.0
"""One block of GPTQ's columns, solved one after another (Frantar et al. 2023, algorithm 1).

With D = W - Q, column j of the block is rounded after what columns before it have left over was
added to it, ``q_j = nearest(target_j + sum_{i<j} scaled_ji D_i)``, and ``D_j = W_j - q_j``.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import grid_levels
from pallas_kernels import implementation as implementations
from pallas_kernels.grid_levels import Bits
from pallas_kernels.implementation import Implementation

STRIP = 8  # columns between two products of the reference; fused by XLA into one kernel


def gptq_block(
    target: Float[Array, "E B R"],
    weights: Float[Array, "E B R"],
    scaled: Float[Array, "E B B"],
    grid: Float[Array, "numbers E b R"],
    bits: Bits,
    *,
    implementation: Implementation = "auto",
) -> Float[Array, "E B R"]:
    """D of a block's columns; call it inside a jitted function.

    Args:
      target: float32, the weights and what earlier blocks add to them, columns before rows.
      weights: float32.
      scaled: float32, lower triangular: the block's corner of the Hessian's factor over its
        diagonal. What is above the diagonal is not read.
      grid: one for all columns (b = 1), or one for each; of two numbers, ternary ones also of four
        (`grid_levels`).
      bits: the kind of grid.
      implementation: see `implementation.resolve`. The kernels add in another order: a weight that
        lies on a tie may be rounded to its other neighbour.

    Raises:
      ValueError: columns that are no multiple of 8, or grids of another number of columns or
        numbers.
    """
    columns = weights.shape[1]
    if columns % STRIP or grid.shape[2] not in (1, columns):
        raise ValueError(
            f"a block of {columns} columns with grids for {grid.shape[2]}: expected a multiple of "
            f"{STRIP}, and one grid or {columns}"
        )
    if len(grid) not in ((2, 4) if bits == "ternary" else (2,)):
        raise ValueError(f"grids of {len(grid)} numbers; expected 2, or for ternary weights 4")
    match implementations.resolve(implementation):
        case "xla":
            return gptq_block_xla(target, weights, scaled, grid, bits)
        case "pallas":
            from pallas_kernels.device import gptq_block_pallas as device
        case "triton":
            from pallas_kernels.device import gptq_block_triton as device
    return device.gptq_block(target, weights, scaled, grid, bits)


def gptq_block_xla(
    target: Float[Array, "E B R"],
    weights: Float[Array, "E B R"],
    scaled: Float[Array, "E B B"],
    grid: Float[Array, "numbers E b R"],
    bits: Bits,
) -> Float[Array, "E B R"]:
    """The reference: a product for each strip of columns, then the strip column by column."""

    def strip(index, D_EBR):
        at = index * STRIP
        scaled_ESB = lax.dynamic_slice_in_dim(scaled, at, STRIP, 1)
        target_ESR = lax.dynamic_slice_in_dim(target, at, STRIP, 1)
        # D is zero in columns not yet solved.
        update_ESR = jnp.matmul(scaled_ESB, D_EBR, precision=lax.Precision.HIGHEST)
        D_ESR = _solve_columns(
            target_ESR + update_ESR,
            lax.dynamic_slice_in_dim(weights, at, STRIP, 1),
            lax.dynamic_slice_in_dim(scaled_ESB, at, STRIP, 2),
            _columns(grid, at),
            bits,
        )
        return lax.dynamic_update_slice_in_dim(D_EBR, D_ESR, at, 1)

    return lax.fori_loop(0, weights.shape[1] // STRIP, strip, jnp.zeros_like(weights))


def _columns(grid_2EbR, at):
    if grid_2EbR.shape[2] == 1:
        return grid_2EbR
    return lax.dynamic_slice_in_dim(grid_2EbR, at, STRIP, 2)


def _solve_columns(target_ESR, W_ESR, scaled_ESS, grid_2EbR, bits):
    """The innermost recursion; unrolled, so that columns fuse."""
    D = []
    for j in range(STRIP):
        target_ER = target_ESR[:, j]
        for i in range(j):
            target_ER += scaled_ESS[:, j, i, None] * D[i]
        grid_2ER = grid_2EbR[:, :, min(j, grid_2EbR.shape[2] - 1)]
        D.append(W_ESR[:, j] - grid_levels.nearest(target_ER, grid_2ER, bits))
    return jnp.stack(D, 1)
