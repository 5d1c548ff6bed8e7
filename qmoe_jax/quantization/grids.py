# SPDX-License-Identifier: Apache-2.0
"""The grids of quantized weights: their names in settings, and how they are fitted.

Both kinds (`pallas_kernels.grid_levels`) follow the published QMoE code, so that its packed
checkpoints and goldens can be met level for level. Dimensions: `models/config.py` has the key; here
a grid's two numbers are its axis 0.
"""

from typing import get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.grid_levels import Bits

BITS: tuple[Bits, ...] = get_args(Bits)


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
        return rounded(jnp.stack([low, high]), store_bfloat16)
    # Always true, but XLA can't know: it multiplies by the rounded inverse of a constant divisor,
    # and zero points that lie on a tie move.
    steps = jnp.where(high > low, jnp.float32(2**bits - 1), jnp.float32(1))
    scale = rounded((high - low) / steps, store_bfloat16)
    return jnp.stack([scale, jnp.round(-low / scale)])


def rounded(values: Float[Array, "*shape"], to_bfloat16: bool) -> Float[Array, "*shape"]:
    """As a packed checkpoint holds them, still in float32; as they are where it does not."""
    return values.astype(jnp.bfloat16).astype(jnp.float32) if to_bfloat16 else values
