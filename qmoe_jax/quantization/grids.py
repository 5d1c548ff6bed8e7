# SPDX-License-Identifier: Apache-2.0
"""The values that a quantized weight may take.

A grid is two float32 numbers for each row, or for each group of columns of a row:

* ternary: the row's smallest and largest value; a weight is one of 0, min, max (levels 0, 1, 2);
* uniform (2, 3 or 4 bits): scale and zero point; a weight is `scale * (level - zero)`.

Both follow the published QMoE code, so that its packed checkpoints and goldens can be met level for
level. Dimensions: `models/config.py` has the key; here the two numbers are axis 0 of a grid.
"""

from typing import Literal, TypeAlias, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

Bits = Literal["ternary", 2, 3, 4]
BITS: tuple[Bits, ...] = get_args(Bits)

# The two numbers for each weight: one array, or two.
Grid: TypeAlias = Float[Array, "2 *shape"] | tuple[Float[Array, "*shape"], Float[Array, "*shape"]]


def parse_bits(bits: str | int | float) -> Bits:
    """The grid named by a setting: `"ternary"` (or the paper's 1.5), 2, 3 or 4.

    Raises:
      ValueError: for anything else.
    """
    if bits in ("ternary", 1.5):
        return "ternary"
    for known in (2, 3, 4):
        if bits == known:
            return known
    raise ValueError(f"BITS is {bits!r}; expected 'ternary' (or 1.5), 2, 3 or 4")


def fit(
    weights: Float[Array, "*batch columns rows"], bits: Bits, store_bfloat16: bool
) -> Float[Array, "2 *batch rows"]:
    """The grid of each row, from the range of its weights over `columns`.

    The range always includes 0; a row of zeros gets the range -1 to 1.

    Args:
      weights: float32, rows last.
      bits: the kind of grid.
      store_bfloat16: round the grid to what a packed checkpoint holds, so that whoever quantizes
        with it sees the values that will be read back.
    """
    low = jnp.minimum(weights.min(axis=-2), 0.0)
    high = jnp.maximum(weights.max(axis=-2), 0.0)
    is_zero = (low == 0) & (high == 0)
    low, high = jnp.where(is_zero, -1.0, low), jnp.where(is_zero, 1.0, high)
    if bits == "ternary":
        return _rounded(jnp.stack([low, high]), store_bfloat16)
    # Always true, but XLA can't know: it multiplies by the rounded inverse of a constant divisor,
    # and zero points that lie on a tie move.
    steps = jnp.where(high > low, jnp.float32(2**bits - 1), jnp.float32(1))
    scale = _rounded((high - low) / steps, store_bfloat16)
    return jnp.stack([scale, jnp.round(-low / scale)])


def quantize(weights: Float[Array, "*shape"], grid: Grid, bits: Bits) -> UInt8[Array, "*shape"]:
    """The level of each weight on a grid of the same shape; ternary ties go to 0."""
    first, second = grid
    if bits == "ternary":
        below = jnp.where(weights < first / 2, jnp.uint8(1), jnp.uint8(0))
        return jnp.where(weights > second / 2, jnp.uint8(2), below)
    level = _round_half_even(weights / first) + second
    return jnp.clip(level, 0, 2**bits - 1).astype(jnp.uint8)


def dequantize(levels: UInt8[Array, "*shape"], grid: Grid, bits: Bits) -> Float[Array, "*shape"]:
    """The float32 weight behind each level on a grid of the same shape."""
    first, second = grid
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


def _rounded(values: Float[Array, "*shape"], to_bfloat16: bool) -> Float[Array, "*shape"]:
    return values.astype(jnp.bfloat16).astype(jnp.float32) if to_bfloat16 else values
