# SPDX-License-Identifier: Apache-2.0
"""GPTQ for a group of experts in one jitted call, and the round-to-nearest baseline.

GPTQ quantizes a weight matrix column by column; each column's rounding error is made good by the
columns that follow (Frantar et al. 2023, arXiv 2210.17323, algorithm 1). With `D = W - Q` and the
Hessian factored as `H = M M^T`, M upper triangular, its column update is exactly

    w'_j = w_j + sum_{i<j} D_i M_ij / M_jj

(multiply the algorithm's `W - Q = E U` by `U^-1 = M`). So one Cholesky factorization of H, reversed
in both axes, is all the linear algebra: the inverse Hessian of the usual formulation is never
formed. The sum is taken left-looking, so that no weight is written twice:

    superblock    an eighth of the columns: all that came before it, one large product
      block       `block_size` columns: what came before it in the superblock, one product
        strip     16 columns: what came before it in the block, one product
          column  what came before it in the strip

Experts keep T5X's axes on entry, `[expert, in, out]` = `[E, C, R]`, which is also the layout this
needs: a column is a contiguous vector over the rows. Levels leave as `[E, R, C]`, as codec, store
and kernels speak of them.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt8

from qmoe_jax.quantization import grids

STRIP = 16  # columns solved one after another between two products
UNROLLED = 8  # of those, fused; more would make XLA compute columns again for each use
SUPERBLOCKS = 8  # bounds both the program's size and the zeros multiplied (one in 8)
ERROR_ROWS = 256  # rows that the reported error is measured on
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
    error: Float[Array, " E"]  # |W - Q|^2 / |W|^2 under the damped Hessian; of up to 256 rows


@dataclasses.dataclass(frozen=True)
class GptqOptions:
    """How to solve; the defaults are the paper's (section 4.1 and appendix)."""

    damping: float = 0.1  # of the mean of the Hessian's diagonal
    block_size: int = 128
    group_size: int | None = None  # columns that share a grid; None: the whole row
    activation_order: bool = False  # columns of large activations first

    def __post_init__(self):
        group, block = self.group_size, self.block_size
        if block <= 0 or block % STRIP:
            raise ValueError(f"block_size is {block}; expected a positive multiple of {STRIP}")
        if group is not None and (group <= 0 or (block % group and group % block)):
            raise ValueError(
                f"group_size is {group}; expected a divisor or a multiple of block_size {block}"
            )
        if self.damping < 0:
            raise ValueError(f"damping is {self.damping}; expected 0 or more")


@functools.partial(jax.jit, static_argnames=("bits", "store_bfloat16"))
def round_to_nearest(
    kernel: Float[Array, "E C R"], *, bits: grids.Bits, store_bfloat16: bool = True
) -> Quantized:
    """Each weight to its nearest grid value; the paper's baseline. No Hessian, no solve.

    `error` is relative to the plain norm of the weights.
    """
    W_ECR = kernel.astype(jnp.float32)
    grid_2ER = grids.fit(W_ECR, bits, store_bfloat16)
    grid_2ECR = jnp.broadcast_to(grid_2ER[:, :, None, :], (2, *W_ECR.shape))
    levels_ECR = grids.quantize(W_ECR, grid_2ECR, bits)
    Q_ECR = grids.dequantize(levels_ECR, grid_2ECR, bits)
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
    bits: grids.Bits,
    options: GptqOptions = GptqOptions(),
    store_bfloat16: bool = True,
) -> Quantized:
    """Quantizes each expert so that its outputs, not its weights, change least.

    Args:
      kernel: the weights, any float dtype, T5X's axes.
      hessian: float32, proportional to `X^T X` over the expert's tokens. Zero (no tokens) gives
        round-to-nearest; not positive definite after damping gives it too, for that expert alone.
      bits: the kind of grid.
      options: see `GptqOptions`.
      store_bfloat16: round grids to bfloat16 before the solve (`grids.fit`).
    """
    C = kernel.shape[1]
    order_EC, M_ECC, not_pd_E = _factor(hessian.astype(jnp.float32), options)
    W_ECR = _take(kernel.astype(jnp.float32), order_EC)

    group = options.group_size if options.group_size and options.group_size < C else None
    unit = math.lcm(STRIP, group or 1)
    block = min(max(options.block_size, group or 0), -(-C // unit) * unit)
    padding = -C % block
    W_ECR = jnp.pad(W_ECR, ((0, 0), (0, padding), (0, 0)))
    M_ECC = _pad_with_identity(M_ECC, padding)

    levels_ECR, grid_2EGR, D_ECR = _solve(W_ECR, M_ECC, bits, block, group, store_bfloat16)
    Q_ECR = grids.dequantize(levels_ECR, _per_column(grid_2EGR, levels_ECR.shape[1]), bits)
    back_EC = None if order_EC is None else jnp.argsort(order_EC, axis=1)
    return Quantized(
        levels=_take(levels_ECR[:, :C], back_EC).mT,
        grid=grid_2EGR[:, :, : -(-C // (group or C))].swapaxes(2, 3),
        kernel=_take(Q_ECR[:, :C], back_EC),
        not_pd=not_pd_E,
        error=_relative_error(M_ECC, D_ECR, W_ECR),
    )


def _factor(
    H_ECC: Float[Array, "E C C"], options: GptqOptions
) -> tuple[Int[Array, "E C"] | None, Float[Array, "E C C"], Bool[Array, " E"]]:
    """The order of the columns, and in it the upper triangular M of `H + damping = M M^T`."""
    C = H_ECC.shape[1]
    diagonal_EC = jnp.diagonal(H_ECC, axis1=1, axis2=2)
    damping_E1 = jnp.maximum(options.damping * diagonal_EC.mean(1, keepdims=True), MIN_DAMPING)
    order_EC = None
    if options.activation_order:
        order_EC = jnp.argsort(-diagonal_EC, axis=1)
        H_ECC = _take(_take(H_ECC, order_EC).mT, order_EC).mT
    H_ECC = H_ECC + damping_E1[..., None] * jnp.eye(C, dtype=H_ECC.dtype)[None]
    L_ECC = lax.linalg.cholesky(H_ECC[:, ::-1, ::-1], symmetrize_input=False)
    not_pd_E = ~jnp.isfinite(L_ECC).all((1, 2))
    M_ECC = jnp.where(not_pd_E[:, None, None], jnp.eye(C)[None], L_ECC[:, ::-1, ::-1])
    return order_EC, M_ECC, not_pd_E


def _solve(W_ECR, M_ECC, bits, block, group, store_bfloat16):
    """The column recursion; everything padded to whole blocks. Returns levels, grid and D."""
    E, C, R = W_ECR.shape
    scaled_ECC = M_ECC / jnp.diagonal(M_ECC, axis1=1, axis2=2)[:, None, :]
    groups = C // group if group else 1
    row_grid_2ER = grids.fit(W_ECR, bits, store_bfloat16)
    grid_2EGR = jnp.broadcast_to(row_grid_2ER[:, :, None, :], (2, E, groups, R))
    per_superblock = -(-C // (block * SUPERBLOCKS))
    width = per_superblock * block

    def solve_block(index, state):
        D_ECR, levels_ECR, grid_2EGR, before_EcR = state
        at, inside = index * block, index % per_superblock * block
        start = at - inside
        before_EcR = _superblock_update(scaled_ECC, D_ECR, before_EcR, width, start, inside == 0)
        scaled_EcB = lax.dynamic_slice(scaled_ECC, (0, start, at), (E, width, block))
        update_EBR = lax.dynamic_slice_in_dim(before_EcR, inside, block, 1)
        if per_superblock > 1:
            # Columns not yet solved are still zero in D.
            update_EBR += _mT_times(scaled_EcB, lax.dynamic_slice_in_dim(D_ECR, start, width, 1))
        W_EBR = lax.dynamic_slice_in_dim(W_ECR, at, block, 1)
        if group:
            M_EBB = lax.dynamic_slice(M_ECC, (0, at, at), (E, block, block))
            lazy_EBR = W_EBR + _update_by_earlier_blocks(update_EBR, M_EBB)
            fitted_2EgR = _fit_groups(lazy_EBR, bits, group, store_bfloat16)
            grid_2EGR = lax.dynamic_update_slice_in_dim(grid_2EGR, fitted_2EgR, at // group, 2)
            grid_2EBR = _per_column(fitted_2EgR, block)
        else:
            grid_2EBR = _per_column(grid_2EGR, block)
        scaled_EBB = lax.dynamic_slice_in_dim(scaled_EcB, inside, block, 1)
        D_EBR, levels_EBR = _solve_strips(W_EBR + update_EBR, W_EBR, scaled_EBB, grid_2EBR, bits)
        D_ECR = lax.dynamic_update_slice_in_dim(D_ECR, D_EBR, at, 1)
        levels_ECR = lax.dynamic_update_slice_in_dim(levels_ECR, levels_EBR, at, 1)
        return D_ECR, levels_ECR, grid_2EGR, before_EcR

    # The last superblock may reach past the columns: room for its slices.
    rest = -C % width
    scaled_ECC = jnp.pad(scaled_ECC, ((0, 0), (0, rest), (0, rest)))
    D_ECR = jnp.zeros((E, C + rest, R))
    state = (D_ECR, jnp.zeros(W_ECR.shape, jnp.uint8), grid_2EGR, jnp.zeros((E, width, R)))
    D_ECR, levels_ECR, grid_2EGR, _ = lax.fori_loop(0, C // block, solve_block, state)
    return levels_ECR, grid_2EGR, D_ECR[:, :C]


def _superblock_update(scaled_ECC, D_ECR, before_EcR, width, start, entering):
    """On entering a superblock, the large product of all columns before it; else `before`.

    One branch for each superblock: their products have static shapes, of just the columns solved.
    """

    def product(first):
        return lambda: _mT_times(scaled_ECC[:, :first, first : first + width], D_ECR[:, :first])

    starts = range(0, D_ECR.shape[1], width)
    branch = jnp.where(entering, start // width + 1, 0)
    return lax.switch(branch, [lambda: before_EcR, *(product(first) for first in starts)])


def _update_by_earlier_blocks(update_EBR, M_EBB):
    """What the usual algorithm has added to a block's columns when it reaches the block.

    `update` is `D M / diag(M)` over the earlier columns; the usual `E U` over the same columns is
    `D M M_BB^-1`, M_BB being the block's own corner of M. Grids of column groups are fitted on it.
    """
    product_EBR = update_EBR * jnp.diagonal(M_EBB, axis1=1, axis2=2)[..., None]
    return lax.linalg.triangular_solve(
        M_EBB, product_EBR, left_side=True, lower=False, transpose_a=True
    )


def _fit_groups(W_EBR, bits, group, store_bfloat16):
    E, B, R = W_EBR.shape
    return grids.fit(W_EBR.reshape(E, B // group, group, R), bits, store_bfloat16)


def _solve_strips(target_EBR, W_EBR, scaled_EBB, grid_2EBR, bits, widths=(STRIP, UNROLLED)):
    """Quantizes columns in strips of `widths[0]`, each in strips of `widths[1]` and so on.

    `target` is W plus the update by the columns before these. Returns D and levels.
    """
    if not widths:
        return _solve_columns(target_EBR, W_EBR, scaled_EBB, grid_2EBR, bits)
    width, *narrower = widths

    def strip(index, state):
        D_EBR, levels_EBR = state
        at = index * width
        scaled_EBS = lax.dynamic_slice_in_dim(scaled_EBB, at, width, 2)
        target_ESR = lax.dynamic_slice_in_dim(target_EBR, at, width, 1)
        D_ESR, levels_ESR = _solve_strips(
            target_ESR + _mT_times(scaled_EBS, D_EBR),  # D is zero in columns not yet solved
            lax.dynamic_slice_in_dim(W_EBR, at, width, 1),
            lax.dynamic_slice_in_dim(scaled_EBS, at, width, 1),
            lax.dynamic_slice_in_dim(grid_2EBR, at, width, 2),
            bits,
            narrower,
        )
        return (
            lax.dynamic_update_slice_in_dim(D_EBR, D_ESR, at, 1),
            lax.dynamic_update_slice_in_dim(levels_EBR, levels_ESR, at, 1),
        )

    state = (jnp.zeros_like(W_EBR), jnp.zeros(W_EBR.shape, jnp.uint8))
    return lax.fori_loop(0, W_EBR.shape[1] // width, strip, state)


def _solve_columns(target_EuR, W_EuR, scaled_Euu, grid_2EuR, bits):
    """The innermost recursion, one column after another; unrolled, so that columns fuse."""
    D, levels = [], []
    for j in range(W_EuR.shape[1]):
        target_ER = target_EuR[:, j]
        for i in range(j):
            target_ER += scaled_Euu[:, i, j, None] * D[i]
        levels.append(grids.quantize(target_ER, grid_2EuR[:, :, j], bits))
        D.append(W_EuR[:, j] - grids.dequantize(levels[j], grid_2EuR[:, :, j], bits))
    return jnp.stack(D, 1), jnp.stack(levels, 1)


def _mT_times(A_EKM, B_EKN):
    return jnp.einsum("ekm,ekn->emn", A_EKM, B_EKN, precision=lax.Precision.HIGHEST)


def _relative_error(M_ECC, D_ECR, W_ECR) -> Float[Array, " E"]:
    """`|D M|^2 / |W M|^2` over evenly spaced rows: tr(D H D^T) / tr(W H W^T)."""
    step = -(-W_ECR.shape[2] // ERROR_ROWS)
    error_ECr, energy_ECr = (_mT_times(M_ECC, X[:, :, ::step]) for X in (D_ECR, W_ECR))
    return jnp.sum(error_ECr**2, (1, 2)) / jnp.sum(energy_ECr**2, (1, 2))


def _per_column(grid_2EGR, columns):
    return jnp.repeat(grid_2EGR, columns // grid_2EGR.shape[2], axis=2)


def _take(X_ECN, order_EC):
    """Columns in another order; None leaves them."""
    if order_EC is None:
        return X_ECN
    return jnp.take_along_axis(X_ECN, order_EC[..., None], axis=1)


def _pad_with_identity(M_ECC, padding):
    padded = jnp.pad(M_ECC, ((0, 0), (0, padding), (0, padding)))
    C = M_ECC.shape[1]
    tail = jnp.arange(C, C + padding)
    return padded.at[:, tail, tail].set(1.0)
