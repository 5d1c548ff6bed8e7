# SPDX-License-Identifier: Apache-2.0
"""`sub1_matmul` in Triton; the scheme is that of `sub1_matmul_pallas`."""

from typing import no_type_check  # run-time checks would wrap what Triton parses

import jax
import triton
import triton.language as tl
from jaxtyping import Array, Float, UInt32

from pallas_kernels.device import rows_of_words_triton as rows_of_words
from pallas_kernels.device.row_shape import RowShape, row_shape
from pallas_kernels.device.triton_launch import Launch, launch
from pallas_kernels.packed import PackedExperts
from pallas_kernels.token_tiles import TokenTiles


def sub1_matmul(
    x: Float[Array, "tokens columns"],
    packed: PackedExperts,
    entries: UInt32[Array, " words"],
    tiles: TokenTiles,
    height: int,
    *,
    checked: bool = False,
) -> Float[Array, "tokens rows"]:
    """See `pallas_kernels.sub1_matmul` and, for `tiles` and on, `sub1_matmul_pallas`."""
    return launch(plan(x, packed, entries, tiles, height, checked=checked))


def plan(x, packed, entries, tiles, height, *, checked: bool = False) -> Launch:
    """The kernel with its arguments."""
    shape = tile_shape(packed, height)
    rows = packed.shape[1]
    return Launch(
        kernel=sub1_matmul_kernel,
        arguments=(
            *(tiles.expert, tiles.first, tiles.stop, x),
            *rows_of_words.operands(packed),
            entries,
        ),
        output=jax.ShapeDtypeStruct((x.shape[0], rows), x.dtype),
        grid=(tiles.expert.shape[0], -(-rows // shape.rows)),
        constants={
            "TOKENS": x.shape[0],
            **rows_of_words.constants(packed, shape, checked),
            "HEIGHT": height,
        },
        warps=1,
        stages=1,
    )


def tile_shape(packed: PackedExperts, height: int) -> RowShape:
    """Rows, lanes and words of a program; of 8 tokens 13 words spill, with signs apart 8 do."""
    few = {"qmoe": 10, "tunstall": 7}[packed.codec]
    return row_shape(packed, few if height > 4 else 14)


@no_type_check
@triton.jit
def sub1_matmul_kernel(
    tile_expert,  # int32 [tiles], as the next two
    tile_first,
    tile_stop,
    x,  # [TOKENS, COLUMNS]
    codes,
    bases,
    starts,
    values,
    trees,
    sign_starts,
    entries,
    y,  # [TOKENS, ROWS]
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WORDS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    LANES: tl.constexpr,
    LANE_WORDS: tl.constexpr,
    FIELDS: tl.constexpr,
    TUNSTALL: tl.constexpr,
    HEIGHT: tl.constexpr,
    CHECKED: tl.constexpr,
):
    tile = tl.program_id(0)
    expert = tl.load(tile_expert + tile)
    first = tl.load(tile_first + tile)
    stop = tl.load(tile_stop + tile)
    opened = rows_of_words.open_rows(
        *(expert, tl.program_id(1), bases, starts, values, trees, sign_starts),
        *(EXPERTS, ROWS, TILE_ROWS, TUNSTALL),
    )
    row, _, base, table, begin, end, low, high, sign, last_sign = opened
    low, high = low.to(tl.float32), high.to(tl.float32)
    # A tile's last tokens may be missing: then the last one is read again, and not stored.
    rows_of_x = ()
    sums = ()
    for t in tl.static_range(HEIGHT):
        token = tl.minimum(first + t, TOKENS - 1).to(tl.int64)
        rows_of_x = rows_of_x + (x + token * COLUMNS,)  # noqa: RUF005
        sums = sums + (tl.zeros((TILE_ROWS, LANES), tl.float32),)  # noqa: RUF005

    place = tl.zeros((TILE_ROWS,), tl.int32)
    outside = place
    words = tl.max((end - begin).to(tl.int32), axis=0)
    for i in range((words + LANES * LANE_WORDS - 1) // (LANES * LANE_WORDS)):
        step = rows_of_words.read_step(
            *(i, place, sign, base, table, begin, end, codes, entries),
            *(WORDS, LANES, LANE_WORDS, TUNSTALL, CHECKED),
        )
        found, windows, column, place, sign = step
        for w in tl.static_range(LANE_WORDS):
            for field in tl.static_range(FIELDS):
                at, present, is_high = rows_of_words.nonzero(
                    found[w], windows[w], column, field, TUNSTALL
                )
                if CHECKED:
                    outside += tl.sum((present & (at >= COLUMNS)).to(tl.int32), axis=1)
                    present &= at.to(tl.uint32) < COLUMNS
                weight = tl.where(is_high, high, low)
                added = ()
                for t in tl.static_range(HEIGHT):
                    value = tl.load(rows_of_x[t] + at, mask=present, other=0)
                    added = added + (sums[t] + weight * value.to(tl.float32),)  # noqa: RUF005
                sums = added
            column += rows_of_words.length(found[w], TUNSTALL)

    for t in tl.static_range(HEIGHT):
        total = tl.sum(sums[t], axis=1)
        if CHECKED:
            is_sound = rows_of_words.sound(
                place, sign, last_sign, outside, expert, COLUMNS, EXPERTS, TUNSTALL
            )
            total = tl.where(is_sound, total, float("nan"))
        at = y + (first + t).to(tl.int64) * ROWS + row
        stored_rows = tl.where(first + t < stop, ROWS, 0)
        tl.store(at, total.to(y.dtype.element_ty), mask=row < stored_rows)
