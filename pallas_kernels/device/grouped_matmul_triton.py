# SPDX-License-Identifier: Apache-2.0
"""`grouped_matmul` in Triton; the scheme is that of `grouped_matmul_pallas`."""

from typing import no_type_check  # run-time checks would wrap what Triton parses

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.device.triton_launch import Launch, launch
from pallas_kernels.token_tiles import TokenTiles

_WARPS, _STAGES = 4, 3


def tile(dtype: DTypeLike) -> int:
    """Side of a program's tiles; float32, which takes no tensor cores, spills at 64."""
    return 32 if jnp.dtype(dtype) == jnp.float32 else 64


def grouped_matmul(
    x: Float[Array, "tokens columns"],
    weights: Float[Array, "experts rows columns"],
    tiles: TokenTiles,
    height: int,
) -> Float[Array, "tokens rows"]:
    """See `pallas_kernels.grouped_matmul`; `height` is 16 or more."""
    return launch(plan(x, weights, tiles, height))


def plan(x, weights, tiles, height) -> Launch:
    """The kernel with its arguments."""
    experts, rows, columns = weights.shape
    side = tile(x.dtype)
    return Launch(
        kernel=grouped_matmul_kernel,
        arguments=(tiles.expert, tiles.first, tiles.stop, x, weights),
        output=jax.ShapeDtypeStruct((x.shape[0], rows), x.dtype),
        grid=(tiles.expert.shape[0], -(-rows // side)),
        constants={
            "EXPERTS": experts,
            "ROWS": rows,
            "COLUMNS": columns,
            "HEIGHT": height,
            "SIDE": side,
        },
        warps=_WARPS,
        stages=_STAGES,
    )


@no_type_check
@triton.jit
def grouped_matmul_kernel(
    tile_expert,  # int32 [tiles], as the next two
    tile_first,
    tile_stop,
    x,  # [tokens, COLUMNS]
    weights,  # [EXPERTS, ROWS, COLUMNS]
    y,  # [tokens, ROWS]
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEIGHT: tl.constexpr,
    SIDE: tl.constexpr,
):
    tile = tl.program_id(0)
    first = tl.load(tile_first + tile)
    stop = tl.load(tile_stop + tile)
    expert = tl.load(tile_expert + tile)
    weight_rows = tl.where(expert < EXPERTS, ROWS, 0)
    expert = tl.minimum(expert, EXPERTS - 1).to(tl.int64)
    token = first + tl.arange(0, HEIGHT)
    row = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    column = tl.arange(0, SIDE)
    inside_token = (token < stop)[:, None]
    x_at = x + token.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    w_at = weights + (expert * ROWS + row)[None, :] * COLUMNS + column[:, None]

    total = tl.zeros((HEIGHT, SIDE), tl.float32)
    steps = tl.where(first < stop, (COLUMNS + SIDE - 1) // SIDE, 0)
    for i in range(steps):
        there = column < COLUMNS - i * SIDE
        x_tile = tl.load(x_at, mask=inside_token & there[None, :], other=0.0)
        w_tile = tl.load(w_at, mask=(row < weight_rows)[None, :] & there[:, None], other=0.0)
        # Of bfloat16 the precision is no choice; float32 would be rounded to TF32.
        total += tl.dot(x_tile, w_tile, input_precision="ieee")
        x_at += SIDE
        w_at += SIDE
    at = y + token.to(tl.int64)[:, None] * ROWS + row[None, :]
    tl.store(at, total.to(y.dtype.element_ty), mask=inside_token & (row < ROWS)[None, :])
