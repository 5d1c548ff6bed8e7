# SPDX-License-Identifier: Apache-2.0
"""The Hessians of a group of experts, accumulated chunk of tokens by chunk of tokens.

The layer-wise error |WX - QX|^2 has the Hessian `2 X X^T`; GPTQ does not see its scale, so what is
summed here is `X^T X` over the tokens routed to each expert, in float32. A chunk has a fixed number
of rows, short ones are padded with zero rows, which add nothing.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

STRIPS = 4  # block rows of the upper triangle: 5/8 of the full product's work


def zeros(experts: int, columns: int) -> Float[Array, "E C C"]:
    """The Hessians before the first chunk."""
    return jnp.zeros((experts, columns, columns), jnp.float32)


def add_tokens(
    hessian: Float[Array, "E C C"], tokens: Float[Array, "N C"], expert: Int[Array, ""]
) -> Float[Array, "E C C"]:
    """Adds `tokens^T tokens` to one expert's Hessian, in the upper block triangle only.

    Pure, and written to run inside a jitted step that donates `hessian`. Call `symmetric` once
    after the last chunk.
    """
    tokens = tokens.astype(jnp.float32)
    C = tokens.shape[1]
    width = -(-C // STRIPS)
    for start in range(0, C, width):
        stop = min(start + width, C)
        product = jnp.matmul(
            tokens[:, start:stop].T, tokens[:, start:], precision=lax.Precision.HIGHEST
        )
        at = (expert, jnp.int32(start), jnp.int32(start))
        old = lax.dynamic_slice(hessian, at, (1, *product.shape))
        hessian = lax.dynamic_update_slice(hessian, old + product[None], at)
    return hessian


@functools.partial(jax.jit, donate_argnums=0)
def symmetric(hessian: Float[Array, "E C C"]) -> Float[Array, "E C C"]:
    """The whole Hessians from their upper block triangles."""
    upper = jnp.triu(hessian)
    return upper + jnp.triu(hessian, 1).mT
