# SPDX-License-Identifier: Apache-2.0
"""`gptq_block` in Triton; the scheme is that of `gptq_block_pallas`."""

from typing import no_type_check  # run-time checks would wrap what Triton parses

import jax
import triton
import triton.language as tl
from jaxtyping import Array, Float

from pallas_kernels.device.triton_launch import Launch, launch
from pallas_kernels.grid_levels import Bits

ROWS = 32  # of a program; 64 spill
_WARPS = 4


def gptq_block(
    target: Float[Array, "E B R"],
    weights: Float[Array, "E B R"],
    scaled: Float[Array, "E B B"],
    grid: Float[Array, "numbers E b R"],
    bits: Bits,
) -> Float[Array, "E B R"]:
    """See `pallas_kernels.gptq_block`."""
    return launch(plan(target, weights, scaled, grid, bits))


def plan(target, weights, scaled, grid, bits: Bits) -> Launch:
    """The kernel with its arguments."""
    experts, columns, rows = weights.shape
    return Launch(
        kernel=gptq_block_kernel,
        arguments=(target, weights, scaled, grid),
        output=jax.ShapeDtypeStruct(weights.shape, weights.dtype),
        grid=(experts, -(-rows // ROWS)),
        constants={
            "EXPERTS": experts,
            "COLUMNS": columns,
            "ROWS": rows,
            "PADDED": 1 << (columns - 1).bit_length(),
            "TILE_ROWS": ROWS,
            "GRIDS": grid.shape[2],
            "THRESHOLDS": len(grid) == 4,
            "MAX_LEVEL": 0 if bits == "ternary" else 2**bits - 1,
        },
        warps=_WARPS,
        stages=1,
    )


@no_type_check
@triton.jit
def nearest(weights, first, second, low, high, MAX_LEVEL: tl.constexpr):
    """`grid_levels.nearest`; a `MAX_LEVEL` of 0 stands for ternary grids."""
    if MAX_LEVEL == 0:
        below = tl.where(weights < low, first, 0.0)
        value = tl.where(weights > high, second, below)
    else:
        steps = tl.div_rn(weights, first)
        floor = tl.floor(steps)
        over = steps - floor
        odd = floor - 2 * tl.floor(floor / 2) == 1
        up = (over > 0.5) | ((over == 0.5) & odd)
        level = tl.where(up, floor + 1, floor) + second
        level = tl.minimum(tl.maximum(level, 0), MAX_LEVEL)
        value = first * (level - second)
    return value


@no_type_check
@triton.jit
def gptq_block_kernel(
    target,  # float32 [EXPERTS, COLUMNS, ROWS]
    weights,  # as `target`
    scaled,  # float32 [EXPERTS, COLUMNS, COLUMNS]
    grid,  # float32 [4 if THRESHOLDS else 2, EXPERTS, GRIDS, ROWS]
    out,  # as `target`
    EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    GRIDS: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    MAX_LEVEL: tl.constexpr,
):
    expert = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    inside = row < ROWS
    column = tl.arange(0, PADDED)
    target += expert * COLUMNS * ROWS + row
    weights += expert * COLUMNS * ROWS + row
    scaled += expert * COLUMNS * COLUMNS + column
    first_grid = grid + expert * GRIDS * ROWS + row
    step = EXPERTS * GRIDS * ROWS

    D = tl.zeros((PADDED, TILE_ROWS), tl.float32)
    for j in range(COLUMNS):
        factor = tl.load(scaled + j * COLUMNS, mask=column < j, other=0.0)
        value = tl.load(target + j * ROWS, mask=inside, other=0.0)
        value += tl.sum(factor[:, None] * D, axis=0)
        at = j * ROWS if GRIDS > 1 else 0
        first = tl.load(first_grid + at, mask=inside, other=1.0)
        second = tl.load(first_grid + step + at, mask=inside, other=1.0)
        if THRESHOLDS:
            low = tl.load(first_grid + 2 * step + at, mask=inside, other=1.0)
            high = tl.load(first_grid + 3 * step + at, mask=inside, other=1.0)
        else:
            low, high = first / 2, second / 2
        weight = tl.load(weights + j * ROWS, mask=inside, other=0.0)
        left = weight - nearest(value, first, second, low, high, MAX_LEVEL)
        D = tl.where((column == j)[:, None], left[None, :], D)

    at = out + expert * COLUMNS * ROWS + column[:, None] * ROWS + row[None, :]
    tl.store(at, D, mask=(column < COLUMNS)[:, None] & inside[None, :])
