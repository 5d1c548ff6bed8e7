# SPDX-License-Identifier: Apache-2.0
"""The column recursion of GPTQ, by blocks: all large products, and `gptq_block` inside a block.

Solves `q_j = nearest(target_j + sum_{i<j} F_ji / F_jj D_i)`, `D_j = W_j - q_j`, one column after
another, F being the Hessian's factor N, or, to revisit columns that are quantized already, the
Hessian itself (`least_squares.py`). Left-looking, so that no weight is written twice:

    superblock    an eighth of the columns: all that came before it, one large product
      block       `block` columns: what came before it in the superblock, one product
        column    what came before it in the block (`pallas_kernels.gptq_block`)

Dimensions: experts E, columns C, rows R; layouts are `gptq.py`'s.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.gptq_block import gptq_block
from pallas_kernels.grid_levels import Bits
from qmoe_jax.quantization import grids

SUPERBLOCKS = 8  # bounds both the program's size and the zeros multiplied (one in 8)


class Ternary(NamedTuple):
    """Row values that are given, with thresholds of their own.

    A weight of column j is 0 between `low + penalty_low / weight_j` and the like of `high`.
    """

    values: Float[Array, "2 E R"]
    thresholds: Float[Array, "2 E R"]
    penalty: Float[Array, "2 E R"]
    weight: Float[Array, "E C"]


def solve(
    target: Float[Array, "E C R"],
    weights: Float[Array, "E C R"],
    factor: Float[Array, "E C C"],
    bits: Bits,
    block: int,
    group: int | None = None,
    store_bfloat16: bool = True,
    ternary: Ternary | None = None,
) -> tuple[Float[Array, "E C R"], Float[Array, "2 E G R"]]:
    """D of all columns, and the grid that they were rounded to.

    Args:
      target: the weights, and what else is to be added to them before the first column is rounded.
      weights: float32, a whole number of blocks of columns.
      factor: only what is on and below the diagonal is read.
      bits: the kind of grid.
      block: columns between two products.
      group: columns that share a grid, fitted when a block is reached; None: one for each row.
      store_bfloat16: see `grids.fit`.
      ternary: the grid, if it is not to be fitted.
    """
    W_ECR, N_ECC = weights, factor
    E, C, R = W_ECR.shape
    scaled_ECC = N_ECC / jnp.diagonal(N_ECC, axis1=1, axis2=2)[..., None]
    groups = C // group if group else 1
    row_grid_2ER = ternary.values if ternary else grids.fit(W_ECR, bits, store_bfloat16)
    grid_2EGR = jnp.broadcast_to(row_grid_2ER[:, :, None, :], (2, E, groups, R))
    per_superblock = -(-C // (block * SUPERBLOCKS))
    width = per_superblock * block

    def solve_block(index, state):
        D_ECR, grid_2EGR, before_EcR = state
        at, inside = index * block, index % per_superblock * block
        start = at - inside
        before_EcR = _superblock_update(scaled_ECC, D_ECR, before_EcR, width, start, inside == 0)
        scaled_EBc = lax.dynamic_slice(scaled_ECC, (0, at, start), (E, block, width))
        update_EBR = lax.dynamic_slice_in_dim(before_EcR, inside, block, 1)
        if per_superblock > 1:
            # Columns not yet solved are still zero in D.
            update_EBR += times(scaled_EBc, lax.dynamic_slice_in_dim(D_ECR, start, width, 1))
        W_EBR = lax.dynamic_slice_in_dim(W_ECR, at, block, 1)
        if group:
            N_EBB = lax.dynamic_slice(N_ECC, (0, at, at), (E, block, block))
            lazy_EBR = W_EBR + _update_by_earlier_blocks(update_EBR, N_EBB)
            fitted_2EgR = _fit_groups(lazy_EBR, bits, group, store_bfloat16)
            grid_2EGR = lax.dynamic_update_slice_in_dim(grid_2EGR, fitted_2EgR, at // group, 2)
            grid_2EbR = per_column(fitted_2EgR, block)
        elif ternary:
            grid_2EbR = _with_thresholds(ternary, at, block)
        else:
            grid_2EbR = grid_2EGR  # one for all columns
        scaled_EBB = lax.dynamic_slice_in_dim(scaled_EBc, inside, block, 2)
        target_EBR = lax.dynamic_slice_in_dim(target, at, block, 1)
        D_EBR = gptq_block(target_EBR + update_EBR, W_EBR, scaled_EBB, grid_2EbR, bits)
        D_ECR = lax.dynamic_update_slice_in_dim(D_ECR, D_EBR, at, 1)
        return D_ECR, grid_2EGR, before_EcR

    # The last superblock may reach past the columns: room for its slices.
    rest = -C % width
    scaled_ECC = jnp.pad(scaled_ECC, ((0, 0), (0, rest), (0, rest)))
    D_ECR = jnp.zeros((E, C + rest, R), W_ECR.dtype)
    state = (D_ECR, grid_2EGR, jnp.zeros((E, width, R), W_ECR.dtype))
    D_ECR, grid_2EGR, _ = lax.fori_loop(0, C // block, solve_block, state)
    return D_ECR[:, :C], grid_2EGR


def _with_thresholds(ternary: Ternary, at, block: int) -> Float[Array, "4 E B R"]:
    """The grid of a block's columns."""
    weight_1EB1 = lax.dynamic_slice_in_dim(ternary.weight, at, block, 1)[None, ..., None]
    thresholds_2EBR = ternary.thresholds[:, :, None] + ternary.penalty[:, :, None] / weight_1EB1
    values_2EBR = jnp.broadcast_to(ternary.values[:, :, None], thresholds_2EBR.shape)
    return jnp.concatenate([values_2EBR, thresholds_2EBR])


def _superblock_update(scaled_ECC, D_ECR, before_EcR, width, start, entering):
    """On entering a superblock, the large product of all columns before it; else `before`.

    One branch for each superblock: their products have static shapes, of just the columns solved.
    """

    def product(first):
        return lambda: times(scaled_ECC[:, first : first + width, :first], D_ECR[:, :first])

    starts = range(0, D_ECR.shape[1], width)
    branch = jnp.where(entering, start // width + 1, 0)
    return lax.switch(branch, [lambda: before_EcR, *(product(first) for first in starts)])


def _update_by_earlier_blocks(update_EBR, N_EBB):
    """What the usual algorithm has added to a block's columns when it reaches the block.

    `update` is `N D / diag(N)` over the earlier columns; the usual `U^T E` over the same columns is
    `N_BB^-1 N D`, N_BB being the block's own corner of N. Grids of column groups are fitted on it.
    """
    product_EBR = update_EBR * jnp.diagonal(N_EBB, axis1=1, axis2=2)[..., None]
    return lax.linalg.triangular_solve(N_EBB, product_EBR, left_side=True, lower=True)


def _fit_groups(W_EBR, bits, group, store_bfloat16):
    E, B, R = W_EBR.shape
    return grids.fit(W_EBR.reshape(E, B // group, group, R), bits, store_bfloat16)


def times(A_EMK: Float[Array, "E M K"], B_EKN: Float[Array, "E K N"]) -> Float[Array, "E M N"]:
    """Their products in full float32."""
    return jnp.matmul(A_EMK, B_EKN, precision=lax.Precision.HIGHEST)


def per_column(grid_2EGR: Float[Array, "2 E G R"], columns: int) -> Float[Array, "2 E C R"]:
    """Each column's grid of those of column groups."""
    if grid_2EGR.shape[2] == 1:
        return jnp.broadcast_to(grid_2EGR, (*grid_2EGR.shape[:2], columns, grid_2EGR.shape[3]))
    return jnp.repeat(grid_2EGR, columns // grid_2EGR.shape[2], axis=2)
