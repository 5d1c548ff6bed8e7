# SPDX-License-Identifier: Apache-2.0
"""`sub1_decode` in Triton; the scheme is that of `sub1_decode_pallas`."""

from typing import no_type_check  # run-time checks would wrap what Triton parses

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.device import rows_of_words_triton as rows_of_words
from pallas_kernels.device.row_shape import row_shape
from pallas_kernels.device.triton_launch import Launch, launch
from pallas_kernels.packed import PackedExperts

_CLEARED = 256  # columns a step


def sub1_decode(
    packed: PackedExperts,
    entries: UInt32[Array, " words"],
    experts: Int[Array, " n"],
    dtype: DTypeLike,
    *,
    checked: bool = False,
) -> Float[Array, "n rows columns"]:
    """See `pallas_kernels.sub1_decode`; `checked` as in `sub1_decode_pallas`."""
    experts = experts.astype(jnp.int32)
    return launch(plan(packed, entries, experts, dtype, checked=checked))


def plan(packed, entries, experts, dtype, *, checked: bool = False) -> Launch:
    """The kernel with its arguments."""
    shape = row_shape(packed)
    _, rows, columns = packed.shape
    return Launch(
        kernel=sub1_decode_kernel,
        arguments=(experts, *rows_of_words.operands(packed), entries),
        output=jax.ShapeDtypeStruct((experts.shape[0], rows, columns), jnp.dtype(dtype)),
        grid=(experts.shape[0], -(-rows // shape.rows)),
        constants={
            **rows_of_words.constants(packed, shape, checked),
            "CLEARED": _CLEARED,
        },
        warps=1,
        stages=1,
    )


@no_type_check
@triton.jit
def sub1_decode_kernel(
    experts,  # int32 [n]
    codes,
    bases,
    starts,
    values,
    trees,
    sign_starts,
    entries,
    out,  # [n, ROWS, COLUMNS]
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WORDS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    LANES: tl.constexpr,
    LANE_WORDS: tl.constexpr,
    FIELDS: tl.constexpr,
    TUNSTALL: tl.constexpr,
    CLEARED: tl.constexpr,
    CHECKED: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    expert = tl.load(experts + n)
    opened = rows_of_words.open_rows(
        *(expert, tl.program_id(1), bases, starts, values, trees, sign_starts),
        *(EXPERTS, ROWS, TILE_ROWS, TUNSTALL),
    )
    row, inside, base, table, begin, end, low, high, sign, last_sign = opened
    dtype = out.dtype.element_ty
    low, high = low.to(dtype), high.to(dtype)
    rows_of_out = out + (n * ROWS + row)[:, None] * COLUMNS
    for i in range((COLUMNS + CLEARED - 1) // CLEARED):
        column = i * CLEARED + tl.arange(0, CLEARED)
        zeros = tl.zeros((TILE_ROWS, CLEARED), dtype)
        mask = inside[:, None] & (column < COLUMNS)[None, :]
        tl.store(rows_of_out + column[None, :], zeros, mask=mask)
    tl.debug_barrier()

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
                tl.store(rows_of_out + at, tl.where(is_high, high, low), mask=present)
            column += rows_of_words.length(found[w], TUNSTALL)

    if CHECKED:
        tl.debug_barrier()
        is_sound = rows_of_words.sound(
            place, sign, last_sign, outside, expert, COLUMNS, EXPERTS, TUNSTALL
        )
        wrong = inside & (is_sound == 0)
        nan = tl.full((TILE_ROWS, 1), float("nan"), dtype)
        tl.store(rows_of_out, nan, mask=wrong[:, None])
