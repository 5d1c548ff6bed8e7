# SPDX-License-Identifier: Apache-2.0
"""GPTQ for a group of experts in one jitted call, and the round-to-nearest baseline.

GPTQ quantizes a weight matrix column by column; each column's rounding error is made good by the
columns that follow (Frantar et al. 2023, arXiv 2210.17323, algorithm 1). With `D = W - Q` and the
Hessian factored as `H = N^T N`, N lower triangular, its column update is exactly

    w'_j = w_j + sum_{i<j} N_ji / N_jj D_i

(multiply the algorithm's `W - Q = E U` by `U^-1 = N^T`). So one Cholesky factorization of H,
reversed in both axes, is all the linear algebra: the inverse Hessian of the usual formulation is
never formed. `columns.py` takes the sum.

Experts keep T5X's axes on entry, `[expert, in, out]` = `[E, C, R]`, which is also the layout this
needs: a column is a contiguous vector over the rows. Levels leave as `[E, R, C]`, as codec, store
and kernels speak of them.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt8

from pallas_kernels import grid_levels
from pallas_kernels.gptq_block import STRIP
from pallas_kernels.grid_levels import Bits
from qmoe_jax.quantization import columns, grids, least_squares
from qmoe_jax.quantization.columns import times

GridFit = Literal["minmax", "least_squares"]
ERROR_ROWS = 64  # rows that the reported error is measured on
MIN_DAMPING = 1e-6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A group of experts of one matrix, quantized.

    `grid` holds one pair for each row and column group (`grids.py`); G = 1 without a group size.
    With activation order, groups are of the permuted columns and `levels` cannot be read with
    `grid` alone: `kernel` is always the dequantized weight.
    """

    levels: UInt8[Array, "E R C"]
    grid: Float[Array, "2 E R G"]
    kernel: Float[Array, "E C R"]  # dequantized, T5X's axes
    not_pd: Bool[Array, " E"]  # the Hessian was not positive definite: rounded to nearest
    error: Float[Array, " E"]  # |W - Q|^2 / |W|^2 under the damped Hessian; of up to 64 rows


@dataclasses.dataclass(frozen=True)
class GptqOptions:
    """How to solve; the defaults are the paper's (section 4.1 and appendix)."""

    damping: float = 0.1  # of the mean of the Hessian's diagonal
    block_size: int = 128
    group_size: int | None = None  # columns that share a grid; None: the whole row
    activation_order: bool = False  # columns of large activations first
    grid: GridFit = "minmax"  # a row's range; or `least_squares.py`, for ternary weights
    penalty: float = 0.0  # with "least_squares": on bits
    sweeps: int = 3  # of "least_squares"

    def __post_init__(self):
        group, block = self.group_size, self.block_size
        if block <= 0 or block % STRIP:
            raise ValueError(f"BLOCK_SIZE is {block}; expected a positive multiple of {STRIP}")
        if group is not None and (group <= 0 or (block % group and group % block)):
            raise ValueError(
                f"GROUP_SIZE is {group}; expected a divisor or a multiple of BLOCK_SIZE {block}"
            )
        if not 0 <= self.damping < math.inf:
            raise ValueError(f"DAMPING is {self.damping}; expected a number of 0 or more")
        if not 0 <= self.penalty < math.inf:
            raise ValueError(f"LAMBDA is {self.penalty}; expected a number of 0 or more")
        if self.sweeps < 0:
            raise ValueError(f"SWEEPS is {self.sweeps}; expected 0 or more")
        if self.grid == "minmax" and self.penalty:
            raise ValueError(f"LAMBDA {self.penalty} is for GRID 'least_squares': set that too")
        if self.grid != "minmax" and self.group_size:
            raise ValueError(f"GRID {self.grid!r} has one grid a row: leave GROUP_SIZE out")


@functools.partial(jax.jit, static_argnames=("bits", "store_bfloat16"))
def round_to_nearest(
    kernel: Float[Array, "E C R"], *, bits: Bits, store_bfloat16: bool = True
) -> Quantized:
    """Each weight to its nearest grid value; the paper's baseline. No Hessian, no solve.

    `error` is relative to the plain norm of the weights.
    """
    W_ECR = kernel.astype(jnp.float32)
    grid_2ER = grids.fit(W_ECR, bits, store_bfloat16)
    grid_2ECR = jnp.broadcast_to(grid_2ER[:, :, None, :], (2, *W_ECR.shape))
    levels_ECR = grid_levels.quantize(W_ECR, grid_2ECR, bits)
    Q_ECR = grid_levels.dequantize(levels_ECR, grid_2ECR, bits)
    return Quantized(
        levels=levels_ECR.mT,
        grid=grid_2ER[..., None],
        kernel=Q_ECR,
        not_pd=jnp.zeros(len(W_ECR), bool),
        error=jnp.sum((W_ECR - Q_ECR) ** 2, (1, 2)) / jnp.sum(W_ECR**2, (1, 2)),
    )


@functools.partial(jax.jit, static_argnames=("bits", "options", "store_bfloat16"))
def gptq(
    kernel: Float[Array, "E C R"],
    hessian: Float[Array, "E C C"],
    *,
    bits: Bits,
    options: GptqOptions = GptqOptions(),
    store_bfloat16: bool = True,
) -> Quantized:
    """Quantizes each expert so that its outputs, not its weights, change least.

    Args:
      kernel: the weights, any float dtype, T5X's axes.
      hessian: float32, proportional to `X^T X` over the expert's tokens; only the lower triangle is
        read. Zero (no tokens) gives round-to-nearest; not positive definite after damping gives it
        too, for that expert alone.
      bits: the kind of grid.
      options: see `GptqOptions`.
      store_bfloat16: round grids to bfloat16 before the solve (`grids.fit`).

    Raises:
      ValueError: least squares asked for, and bits that are not ternary.
    """
    if options.grid != "minmax" and bits != "ternary":
        raise ValueError(f"GRID {options.grid!r} is for BITS 'ternary', not {bits}")
    C = kernel.shape[1]
    order_EC, H_ECC, N_ECC, not_pd_E = _factor(hessian.astype(jnp.float32), options)
    W_ECR = _take(kernel.astype(jnp.float32), order_EC)

    group = options.group_size if options.group_size and options.group_size < C else None
    unit = math.lcm(STRIP, group or 1)
    block = min(max(options.block_size, group or 0), -(-C // unit) * unit)
    padding = -C % block
    W_ECR = jnp.pad(W_ECR, ((0, 0), (0, padding), (0, 0)))
    N_ECC = _pad_with_identity(N_ECC, padding)

    if options.grid == "minmax":
        D_ECR, grid_2EGR = columns.solve(W_ECR, W_ECR, N_ECC, bits, block, group, store_bfloat16)
    else:
        first = least_squares.first_grid(W_ECR, store_bfloat16)
        D_ECR, _ = columns.solve(W_ECR, W_ECR, N_ECC, bits, block, ternary=first)
        D_ECR, values_2ER = least_squares.refine(
            W_ECR,
            _pad_with_identity(_symmetric(H_ECC), padding),
            D_ECR,
            first.values,
            penalty=options.penalty,
            sweeps=options.sweeps,
            block=block,
            store_bfloat16=store_bfloat16,
        )
        grid_2EGR = values_2ER[:, :, None]
    grid_2ECR = columns.per_column(grid_2EGR, W_ECR.shape[1])
    levels_ECR = grid_levels.quantize(W_ECR - D_ECR, grid_2ECR, bits)
    Q_ECR = grid_levels.dequantize(levels_ECR, grid_2ECR, bits)
    back_EC = None if order_EC is None else jnp.argsort(order_EC, axis=1)
    return Quantized(
        levels=_take(levels_ECR[:, :C], back_EC).mT,
        grid=grid_2EGR[:, :, : -(-C // (group or C))].swapaxes(2, 3),
        kernel=_take(Q_ECR[:, :C], back_EC),
        not_pd=not_pd_E,
        error=_relative_error(N_ECC, D_ECR, W_ECR),
    )


def _factor(
    H_ECC: Float[Array, "E C C"], options: GptqOptions
) -> tuple[
    Int[Array, "E C"] | None, Float[Array, "E C C"], Float[Array, "E C C"], Bool[Array, " E"]
]:
    """The order of the columns; in it `H + damping` and the lower triangular N of that, `N^T N`.

    Of the former what is on and below the diagonal counts. The identity, both, if there is no N.
    """
    C = H_ECC.shape[1]
    diagonal_EC = jnp.diagonal(H_ECC, axis1=1, axis2=2)
    damping_E1 = jnp.maximum(options.damping * diagonal_EC.mean(1, keepdims=True), MIN_DAMPING)
    order_EC = None
    if options.activation_order:
        order_EC = jnp.argsort(-diagonal_EC, axis=1)
        H_ECC = _symmetric(H_ECC)
        H_ECC = _take(_take(H_ECC, order_EC).mT, order_EC).mT
    H_ECC = H_ECC + damping_E1[..., None] * jnp.eye(C, dtype=H_ECC.dtype)[None]
    # LAPACK's matrices are stored by columns: the transpose of ours is one of these as it stands.
    L_ECC = lax.linalg.cholesky(H_ECC.mT[:, ::-1, ::-1], symmetrize_input=False)
    not_pd_E = ~jnp.isfinite(jnp.diagonal(L_ECC, axis1=1, axis2=2)).all(1)
    eye_1CC = jnp.eye(C, dtype=H_ECC.dtype)[None]
    H_ECC, N_ECC = (
        jnp.where(not_pd_E[:, None, None], eye_1CC, found)
        for found in (H_ECC, L_ECC.mT[:, ::-1, ::-1])
    )
    return order_EC, H_ECC, N_ECC, not_pd_E


def _symmetric(lower_ECC):
    return jnp.tril(lower_ECC) + jnp.tril(lower_ECC, -1).mT


def _relative_error(N_ECC, D_ECR, W_ECR) -> Float[Array, " E"]:
    """`|N D|^2 / |N W|^2` over evenly spaced rows: tr(D^T H D) / tr(W^T H W)."""
    step = -(-W_ECR.shape[2] // ERROR_ROWS)
    error_ECr, energy_ECr = (times(N_ECC, X[:, :, ::step]) for X in (D_ECR, W_ECR))
    return jnp.sum(error_ECr**2, (1, 2)) / jnp.sum(energy_ECr**2, (1, 2))


def _take(X_ECN, order_EC):
    """Columns in another order; None leaves them."""
    if order_EC is None:
        return X_ECN
    return jnp.take_along_axis(X_ECN, order_EC[..., None], axis=1)


def _pad_with_identity(N_ECC, padding):
    padded = jnp.pad(N_ECC, ((0, 0), (0, padding), (0, padding)))
    C = N_ECC.shape[1]
    tail = jnp.arange(C, C + padding)
    return padded.at[:, tail, tail].set(1.0)
