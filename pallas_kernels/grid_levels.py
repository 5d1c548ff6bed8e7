# SPDX-License-Identifier: Apache-2.0
"""The values that a quantized weight may take, of operations that Pallas's GPU kernels have too.

A grid is two float32 numbers (ternary ones may have four) for each row, or for each group of
columns of a row:

* ternary: the row's smallest and largest value; a weight is one of 0, min, max (levels 0, 1, 2);
  with two numbers more, the thresholds below and above which it is not 0, else half of those;
* uniform (2, 3 or 4 bits): scale and zero point; a weight is `scale * (level - zero)`.
"""

from typing import Literal, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

Bits: TypeAlias = Literal["ternary", 2, 3, 4]

# The numbers for each weight: one array, or as many as there are numbers.
Grid: TypeAlias = Float[Array, " numbers *shape"] | tuple[Float[Array, "*shape"], ...]


def quantize(weights: Float[Array, "*shape"], grid: Grid, bits: Bits) -> UInt8[Array, "*shape"]:
    """The level of each weight on a grid of the same shape; ternary ties go to 0."""
    first, second, *thresholds = grid
    if bits == "ternary":
        low, high = thresholds or (first / 2, second / 2)
        below = jnp.where(weights < low, jnp.uint8(1), jnp.uint8(0))
        return jnp.where(weights > high, jnp.uint8(2), below)
    level = _round_half_even(weights / first) + second
    return jnp.clip(level, 0, 2**bits - 1).astype(jnp.uint8)


def dequantize(levels: UInt8[Array, "*shape"], grid: Grid, bits: Bits) -> Float[Array, "*shape"]:
    """The float32 weight behind each level on a grid of the same shape."""
    first, second, *_ = grid
    if bits == "ternary":
        return jnp.where(levels == 1, first, jnp.where(levels == 2, second, 0.0))
    return first * (levels.astype(jnp.float32) - second)


def nearest(weights: Float[Array, "*shape"], grid: Grid, bits: Bits) -> Float[Array, "*shape"]:
    """The dequantized levels of the weights."""
    return dequantize(quantize(weights, grid, bits), grid, bits)


def _round_half_even(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`jnp.round`, of operations that Pallas's GPU kernels have too."""
    below = jnp.floor(values)
    over = values - below
    odd = below - 2 * jnp.floor(below / 2) == 1
    return jnp.where((over > 0.5) | ((over == 0.5) & odd), below + 1, below)
