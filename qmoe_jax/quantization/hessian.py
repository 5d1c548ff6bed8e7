# SPDX-License-Identifier: Apache-2.0
"""The Hessians of a group of experts, accumulated tile of tokens by tile of tokens.

The layer-wise error |WX - QX|^2 has the Hessian `2 X X^T`; GPTQ does not see its scale, so what is
summed here is `X^T X` over the tokens routed to each expert, in float32. Only the lower block
triangle is computed, as block rows that each end at their diagonal block. A tile has a fixed number
of rows, short ones are padded with zero rows, which add nothing.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

STRIPS = 4  # block rows of the lower triangle: 5/8 of the full product's work

Strips = tuple[Float[Array, "_ _"], ...]


def zeros(experts: int, columns: int) -> Float[Array, "E C C"]:
    """The Hessians before the first tile."""
    return jnp.zeros((experts, columns, columns), jnp.float32)


def strips(hessian: Float[Array, "E C C"], expert: Int[Array, ""]) -> Strips:
    """One expert's lower block triangle."""
    return tuple(
        lax.dynamic_slice(
            hessian, (expert, jnp.int32(start), jnp.int32(0)), (1, stop - start, stop)
        )[0]
        for start, stop in _bounds(hessian.shape[1])
    )


def add_tile(strips: Strips, tokens: Float[Array, "N C"]) -> Strips:
    """Adds the lower block triangle of `tokens^T tokens`."""
    tokens = tokens.astype(jnp.float32)
    return tuple(
        strip
        + jnp.matmul(tokens[:, start:stop].T, tokens[:, :stop], precision=lax.Precision.HIGHEST)
        for strip, (start, stop) in zip(strips, _bounds(tokens.shape[1]), strict=True)
    )


def with_strips(
    hessian: Float[Array, "E C C"], strips: Strips, expert: Int[Array, ""]
) -> Float[Array, "E C C"]:
    """The Hessians with one expert's lower block triangle replaced.

    Pure, and written to run inside a jitted step that donates `hessian`.
    """
    for strip, (start, _) in zip(strips, _bounds(hessian.shape[1]), strict=True):
        at = (expert, jnp.int32(start), jnp.int32(0))
        hessian = lax.dynamic_update_slice(hessian, strip[None], at)
    return hessian


def _bounds(columns: int) -> list[tuple[int, int]]:
    width = -(-columns // STRIPS)
    return [(start, min(start + width, columns)) for start in range(0, columns, width)]
