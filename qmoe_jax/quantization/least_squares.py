# SPDX-License-Identifier: Apache-2.0
"""Ternary values chosen for the layer's error, not for the range of the weights; beyond the paper.

With H the damped Hessian, the error of a row is `(w - q)^T H (w - q)`. Its range gives GPTQ's
thresholds and, at first, its values. Then, in turn:

    values    given which weights are below, at and above 0, the two values of each row that make
              its error least, in closed form
    weights   column after column, each weight is rounded anew to what makes the error least, all
              others as they are; with a `penalty`, a weight other than 0 has to win that much of
              the row's mean energy for each bit that it costs more than a 0

A rounding that costs more than it removes is what a penalty leaves out: fewer bits at a little more
error. Last, all values of a matrix are multiplied by one number, so that its outputs `W x` and
`Q x` have the product that `W x` has with itself: the error alone would make outputs too small. By
no more than `MAX_SCALE`: where little of a matrix is left, that would be noise made louder.

The result is what the paper's format holds: three values a row.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from pallas_kernels import grid_levels
from qmoe_jax.quantization import columns, grids
from qmoe_jax.quantization.columns import Ternary

FIRST = 0.8  # of the range: the values that GPTQ begins with
MAX_SCALE = 1.25  # reached where the error is a fifth of the energy
MIN_ZEROS, MAX_ZEROS = 0.34, 0.999  # shares that the cost in bits is computed for


class Refined(NamedTuple):
    """D = W - Q, and the values of each row."""

    D: Float[Array, "E C R"]
    values: Float[Array, "2 E R"]


def first_grid(weights: Float[Array, "E C R"], store_bfloat16: bool) -> Ternary:
    """The thresholds of the paper, half of each row's range; values somewhat smaller than that."""
    range_2ER = grids.fit(weights, "ternary", store_bfloat16)
    return Ternary(
        values=grids.rounded(FIRST * range_2ER, store_bfloat16),
        thresholds=range_2ER / 2,
        penalty=jnp.zeros_like(range_2ER),
        weight=jnp.ones(weights.shape[:2], weights.dtype),
    )


def refine(
    weights: Float[Array, "E C R"],
    hessian: Float[Array, "E C C"],
    D: Float[Array, "E C R"],
    values: Float[Array, "2 E R"],
    *,
    penalty: float,
    sweeps: int,
    block: int,
    store_bfloat16: bool,
) -> Refined:
    """What GPTQ has found, made better in `sweeps` turns.

    Args:
      weights: float32, a whole number of blocks of columns.
      hessian: damped, symmetric.
      D: the weights less what GPTQ has rounded them to.
      values: that it rounded to.
      penalty: see above; 0 asks for the least error.
      sweeps: turns; 0 fits the values alone.
      block: columns between two products.
      store_bfloat16: see `grids.fit`.
    """
    HW_ECR = columns.times(hessian, weights)
    energy_ER = jnp.sum(weights * HW_ECR, axis=1) / weights.shape[1]
    upper_ECC = jnp.triu(hessian, 1)
    weight_EC = jnp.diagonal(hessian, axis1=1, axis2=2)

    def fitted(D_ECR, values_2ER) -> Refined:
        levels_ECR = _levels(weights - D_ECR, values_2ER)
        values_2ER = fit_values(levels_ECR, hessian, HW_ECR, values_2ER)
        values_2ER = grids.rounded(values_2ER, store_bfloat16)
        return Refined(weights - _dequantized(levels_ECR, values_2ER), values_2ER)

    def turn(_, state: Refined) -> Refined:
        D_ECR, values_2ER = state
        cost_ER = penalty * energy_ER * _bits_of_nonzero(weights == D_ECR)[:, None]
        grid = Ternary(
            values=values_2ER,
            thresholds=values_2ER / 2,
            penalty=jnp.where(values_2ER == 0, 0.0, cost_ER[None] / (2 * values_2ER)),
            weight=weight_EC,
        )
        target_ECR = weights + columns.times(upper_ECC, D_ECR) / weight_EC[..., None]
        D_ECR, _ = columns.solve(target_ECR, weights, hessian, "ternary", block, ternary=grid)
        return fitted(D_ECR, values_2ER)

    D_ECR, values_2ER = lax.fori_loop(0, sweeps, turn, fitted(D, values))
    Q_ECR = weights - D_ECR
    levels_ECR = _levels(Q_ECR, values_2ER)
    products = jnp.sum(weights * HW_ECR, (1, 2)), jnp.sum(Q_ECR * HW_ECR, (1, 2))
    scale_E = jnp.where(products[1] > 0, products[0] / products[1], 1.0)
    scale_E = jnp.clip(scale_E, 1.0, MAX_SCALE)
    values_2ER = grids.rounded(scale_E[None, :, None] * values_2ER, store_bfloat16)
    return Refined(weights - _dequantized(levels_ECR, values_2ER), values_2ER)


def fit_values(
    levels: UInt8[Array, "E C R"],
    hessian: Float[Array, "E C C"],
    hessian_times_weights: Float[Array, "E C R"],
    values: Float[Array, "2 E R"],
) -> Float[Array, "2 E R"]:
    """The values of each row that make `(w - q)^T H (w - q)` least, given its levels.

    With l and h the 0-1 vectors of the row's levels 1 and 2, the normal equations are

        l^T H l a + l^T H h b = l^T H w        l^T H h a + h^T H h b = h^T H w

    A value keeps what it is in `values` where no weight has it, or where it would change its sign.
    """
    low_ECR, high_ECR = ((levels == level).astype(jnp.float32) for level in (1, 2))
    H_low_ECR, H_high_ECR = (columns.times(hessian, of) for of in (low_ECR, high_ECR))
    ll_ER, lh_ER, hh_ER = (
        jnp.sum(of * product, axis=1)
        for of, product in ((low_ECR, H_low_ECR), (high_ECR, H_low_ECR), (high_ECR, H_high_ECR))
    )
    lw_ER, hw_ER = (jnp.sum(of * hessian_times_weights, axis=1) for of in (low_ECR, high_ECR))
    ll_ER, hh_ER = (jnp.where(own == 0, 1.0, own) for own in (ll_ER, hh_ER))  # an unused one
    determinant_ER = ll_ER * hh_ER - lh_ER**2
    low_ER = (hh_ER * lw_ER - lh_ER * hw_ER) / determinant_ER
    high_ER = (ll_ER * hw_ER - lh_ER * lw_ER) / determinant_ER
    return jnp.stack(
        [jnp.where(low_ER < 0, low_ER, values[0]), jnp.where(high_ER > 0, high_ER, values[1])]
    )


def _bits_of_nonzero(is_zero_ECR) -> Float[Array, " E"]:
    """How many bits more a weight takes that is not 0, at each matrix's own share of zeros."""
    zeros_E = jnp.clip(jnp.mean(is_zero_ECR, (1, 2)), MIN_ZEROS, MAX_ZEROS)
    return jnp.log2(zeros_E / ((1 - zeros_E) / 2))


def _levels(Q_ECR, values_2ER) -> UInt8[Array, "E C R"]:
    return grid_levels.quantize(Q_ECR, _per_weight(values_2ER, Q_ECR), "ternary")


def _dequantized(levels_ECR, values_2ER) -> Float[Array, "E C R"]:
    return grid_levels.dequantize(levels_ECR, _per_weight(values_2ER, levels_ECR), "ternary")


def _per_weight(values_2ER, like_ECR):
    return jnp.broadcast_to(values_2ER[:, :, None], (2, *like_ECR.shape))
