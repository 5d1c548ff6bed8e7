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
    entries,
    out,  # [n, ROWS, COLUMNS]
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WORDS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    LANES: tl.constexpr,
    LANE_WORDS: tl.constexpr,
    CLEARED: tl.constexpr,
    CHECKED: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    expert = tl.load(experts + n)
    row, inside, base, begin, end, low, high = rows_of_words.open_rows(
        expert, tl.program_id(1), bases, starts, values, EXPERTS, ROWS, TILE_ROWS
    )
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
    words = tl.max((end - begin).to(tl.int32), axis=0)
    for i in range((words + LANES * LANE_WORDS - 1) // (LANES * LANE_WORDS)):
        found, column, place = rows_of_words.read_step(
            i, place, base, begin, end, codes, entries, WORDS, LANES, LANE_WORDS, CHECKED
        )
        for w in tl.static_range(LANE_WORDS):
            for field in tl.static_range(3):
                at, present, is_high = rows_of_words.nonzero(found[w], column, field)
                if CHECKED:
                    present &= at.to(tl.uint32) < COLUMNS
                tl.store(rows_of_out + at, tl.where(is_high, high, low), mask=present)
            column += (found[w] & 31).to(tl.int32)

    if CHECKED:
        tl.debug_barrier()
        wrong = inside & (place != tl.where(expert < EXPERTS, COLUMNS + COLUMNS % 2, 0))
        nan = tl.full((TILE_ROWS, 1), float("nan"), dtype)
        tl.store(rows_of_out, nan, mask=wrong[:, None])
