# SPDX-License-Identifier: Apache-2.0
"""How a warp of a Triton kernel reads rows of dictionary words; see `rows_of_words_pallas`."""

from typing import Any, no_type_check  # run-time checks would wrap what Triton parses

import triton
import triton.language as tl

from pallas_kernels.device.row_shape import RowShape
from pallas_kernels.packed import PackedExperts


def operands(packed: PackedExperts) -> tuple[Any, ...]:
    """The arrays that decoding kernels take, in this order, before the table."""
    return packed.codes, packed.expert_bases, packed.row_starts, packed.row_values


def constants(packed: PackedExperts, shape: RowShape, checked: bool) -> dict[str, int | bool]:
    """What all decoding kernels know when they are compiled; their words only if it matters."""
    experts, rows, columns = packed.shape
    return {
        "EXPERTS": experts,
        "ROWS": rows,
        "COLUMNS": columns,
        "WORDS": packed.codes.size if checked else 0,
        "TILE_ROWS": shape.rows,
        "LANES": shape.lanes,
        "LANE_WORDS": shape.words,
        "CHECKED": checked,
    }


@no_type_check
@triton.jit
def open_rows(
    expert,
    block,
    bases,  # uint32 [experts]
    starts,  # uint32 [experts, rows + 1]
    values,  # bfloat16 [experts, rows, 2]
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """Rows `block * TILE_ROWS` and following; of the expert E they have no words.

    Returns:
      Row and whether it is one of the matrix; the expert's first word (int64); first word, word
      past the last, min and max value of each row.
    """
    coded_rows = tl.where(expert < EXPERTS, ROWS, 0)
    expert = tl.minimum(expert, EXPERTS - 1).to(tl.int64)
    row = block * TILE_ROWS + tl.arange(0, TILE_ROWS)
    inside = row < ROWS
    at = starts + expert * (ROWS + 1) + row
    begin = tl.load(at, mask=row < coded_rows, other=0)
    end = tl.load(at + 1, mask=row < coded_rows, other=0)
    at = values + (expert * ROWS + row) * 2
    low = tl.load(at, mask=inside, other=0)
    high = tl.load(at + 1, mask=inside, other=0)
    base = tl.load(bases + expert).to(tl.int64) * 64
    return row, inside, base, begin, end, low[:, None], high[:, None]


@no_type_check
@triton.jit
def read_step(
    i,
    place,  # [rows], the column at which this step begins
    base,
    begin,
    end,
    codes,  # uint16 [WORDS]
    entries,  # uint32 [65536]
    WORDS: tl.constexpr,
    LANES: tl.constexpr,
    LANE_WORDS: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """Table entries of the words of step `i`.

    Returns:
      A tuple of entries [rows, lanes], 0 where there is no word; the column at which each lane's
      first word begins; the one at which the next step begins.
    """
    lane = (i * LANES + tl.arange(0, LANES)) * LANE_WORDS
    first = begin[:, None] + lane.to(tl.uint32)[None, :]
    at = codes + (base + first.to(tl.int64))
    found = ()
    length = tl.zeros(first.shape, tl.int32)
    for w in tl.static_range(LANE_WORDS):
        inside = first + w < end[:, None]
        if CHECKED:
            inside &= base + first.to(tl.int64) + w < WORDS
        word = tl.load(at + w, mask=inside, other=0)
        entry = tl.load(entries + word.to(tl.int32), mask=inside, other=0)
        found = found + (entry,)  # noqa: RUF005, Triton unpacks no tuples
        length += (entry & 31).to(tl.int32)
    ends = tl.cumsum(length, axis=1)
    return found, place[:, None] + ends - length, place + tl.max(ends, axis=1)


@no_type_check
@triton.jit
def nonzero(entry, column, field: tl.constexpr):
    """Of a word that begins at `column`: where non-zero `field` is, if there, and if it is max."""
    bits = entry >> (5 + 6 * field)
    present = (entry >> 30) > field
    return column + (bits & 31).to(tl.int32), present, (bits & 32) != 0
