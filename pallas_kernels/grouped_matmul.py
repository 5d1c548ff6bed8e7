# SPDX-License-Identifier: Apache-2.0
"""Tokens of several experts times their dense matrices: ``y[n] = x[n] @ W[expert[n]]^T``.

Not `jax.lax.ragged_dot`, which multiplies every token with every expert, or makes room for it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import implementation as implementations
from pallas_kernels import token_tiles
from pallas_kernels.implementation import Implementation

_XLA_TILE_TOKENS = 16


def grouped_matmul(
    x: Float[Array, "tokens columns"],
    weights: Float[Array, "experts rows columns"],
    group_sizes: Int[Array, " experts"],
    *,
    implementation: Implementation = "auto",
) -> Float[Array, "tokens rows"]:
    """Multiplies every token with its expert's matrix.

    Args:
      x: float32 or bfloat16, sorted by expert; tokens of no expert come last.
      weights: in the dtype of `x`; rows are outputs.
      group_sizes: tokens of each expert, from the first on; together at most `tokens`.
      implementation: see `implementation.resolve`; all sum in float32.

    Returns:
      In the dtype of `x`; zero for tokens of no expert.

    Raises:
      ValueError: shapes or dtypes that do not fit.
    """
    experts, rows, columns = weights.shape
    if x.shape[1:] != (columns,) or x.dtype != weights.dtype or group_sizes.shape != (experts,):
        raise ValueError(
            f"`weights` {weights.dtype} {weights.shape} need `x` {weights.dtype} [tokens, "
            f"{columns}] and `group_sizes` [{experts}], got {x.dtype} {x.shape} and "
            f"{group_sizes.shape}"
        )
    match implementations.resolve(implementation):
        case "xla":
            return grouped_matmul_xla(x, weights, group_sizes)
        case "pallas":
            from pallas_kernels.device import grouped_matmul_pallas as device
        case "triton":
            from pallas_kernels.device import grouped_matmul_triton as device
    if not x.shape[0]:
        return jnp.zeros((0, rows), x.dtype)
    height = device.tile(x.dtype)
    tiles = token_tiles.token_tiles(group_sizes, x.shape[0], height)
    return device.grouped_matmul(x, weights, tiles, height)


@jax.jit
def grouped_matmul_xla(
    x: Float[Array, "tokens columns"],
    weights: Float[Array, "experts rows columns"],
    group_sizes: Int[Array, " experts"],
) -> Float[Array, "tokens rows"]:
    """The reference."""
    return by_expert(x, group_sizes, weights.shape[1], lambda expert: weights[expert])


def by_expert(
    x: Float[Array, "tokens columns"],
    group_sizes: Int[Array, " experts"],
    rows: int,
    matrix: Callable[[Int[Array, ""]], Float[Array, "rows columns"]],
) -> Float[Array, "tokens rows"]:
    """One expert after another, those without tokens left out; for programs that XLA compiles.

    Args:
      x, group_sizes: see `grouped_matmul`.
      rows: of the result.
      matrix: of an expert's index, in the dtype of `x`; asked once for each that has tokens.
    """
    tokens, height = x.shape[0], _XLA_TILE_TOKENS
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    starts = ends - group_sizes.astype(jnp.int32)
    active = jnp.argsort(group_sizes == 0, stable=True)  # those with tokens, in order
    padded = jnp.pad(x, ((0, height), (0, 0)))

    def one_expert(i, y):
        expert = active[i]
        weights_RC = matrix(expert)
        multiply = functools.partial(_times, weights_RC)

        def one_tile(tile, y):
            first = starts[expert] + tile * height
            y_TR = multiply(jax.lax.dynamic_slice_in_dim(padded, first, height))
            inside = (first + jnp.arange(height) < ends[expert])[:, None]
            old = jax.lax.dynamic_slice_in_dim(y, first, height)
            new = jnp.where(inside, y_TR.astype(y.dtype), old)
            return jax.lax.dynamic_update_slice_in_dim(y, new, first, 0)

        tiles = -(-group_sizes[expert].astype(jnp.int32) // height)
        return jax.lax.fori_loop(0, tiles, one_tile, y)

    y = jnp.zeros((tokens + height, rows), x.dtype)
    return jax.lax.fori_loop(0, jnp.sum(group_sizes > 0), one_expert, y)[:tokens]


def _times(weights_RC, x_TC):
    return jax.lax.dot_general(
        x_TC,
        weights_RC,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
