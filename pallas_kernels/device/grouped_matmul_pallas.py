# SPDX-License-Identifier: Apache-2.0
"""`grouped_matmul` as a Pallas kernel, lowered through Triton: a tiled product on tensor cores.

A program multiplies one tile of tokens, all of one expert, with a tile of its rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.token_tiles import TokenTiles

_WARPS, _STAGES = 4, 3


def tile(dtype: DTypeLike) -> int:
    """Side of a program's tiles; float32, which takes no tensor cores, spills at 64."""
    return 32 if jnp.dtype(dtype) == jnp.float32 else 64


@functools.partial(jax.jit, static_argnames=("height", "interpret"))
def grouped_matmul(
    x: Float[Array, "tokens columns"],
    weights: Float[Array, "experts rows columns"],
    tiles: TokenTiles,
    height: int,
    *,
    interpret: bool = False,
) -> Float[Array, "tokens rows"]:
    """See `pallas_kernels.grouped_matmul`.

    Args:
      x, weights: as there; at least one token.
      tiles, height: the tiles of `x` and their tokens, 16 or more.
      interpret: run on the CPU.
    """
    rows, side = weights.shape[1], tile(x.dtype)
    inputs = (tiles.expert, tiles.first, tiles.stop, x, weights)
    return pl.pallas_call(
        functools.partial(_kernel, weights.shape, height, side),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], rows), x.dtype),
        grid=(tiles.expert.shape[0], pl.cdiv(rows, side)),
        in_specs=[pl.BlockSpec()] * len(inputs),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        name="grouped_matmul",
    )(*inputs)


def _kernel(
    shape: tuple[int, ...],
    height: int,
    side: int,
    expert_ref,  # [tiles], as the next two
    first_ref,
    stop_ref,
    x_ref,  # [tokens, columns]
    weights_ref,  # [experts, rows, columns]
    y_ref,  # [tokens, rows]
):
    experts, rows, columns = shape
    tile, block = pl.program_id(0), pl.program_id(1)
    first, stop = first_ref[tile], stop_ref[tile]
    has_expert = expert_ref[tile] < experts
    expert = jnp.minimum(expert_ref[tile], experts - 1)
    token_T, row_R = first + jnp.arange(height), block * side + jnp.arange(side)
    inside_T, inside_R = token_T < stop, row_R < rows
    # Float32 by float32 multiply-adds; the default would round it to TF32.
    precision = jax.lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None

    def step(i, y_TR):
        column_C = i * side + jnp.arange(side)
        inside_C = (column_C < columns)[None, :]
        zero = jnp.zeros((), x_ref.dtype)
        x_TC = plgpu.load(
            x_ref.at[token_T[:, None], column_C[None, :]],
            mask=inside_T[:, None] & inside_C,
            other=zero,
        )
        w_RC = plgpu.load(
            weights_ref.at[expert, row_R[:, None], column_C[None, :]],
            mask=inside_R[:, None] & inside_C & has_expert,
            other=zero,
        )
        product = jax.lax.dot_general(
            x_TC,
            w_RC.T,
            (((1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return y_TR + product

    steps = jnp.where(first < stop, jnp.int32(pl.cdiv(columns, side)), jnp.int32(0))
    y_TR = jnp.zeros((height, side), jnp.float32)
    y_TR = jax.lax.fori_loop(jnp.int32(0), steps, step, y_TR)
    stored_TR = inside_T[:, None] & inside_R[None, :]
    at = y_ref.at[token_T[:, None], row_R[None, :]]
    plgpu.store(at, y_TR.astype(y_ref.dtype), mask=stored_TR)
