# SPDX-License-Identifier: Apache-2.0
"""How a warp of a Triton kernel reads rows of words; see `rows_of_words_pallas`."""

from typing import Any, no_type_check  # run-time checks would wrap what Triton parses

import triton
import triton.language as tl

from pallas_kernels.device.row_shape import RowShape
from pallas_kernels.packed import PackedExperts
from pallas_kernels.validation import words_of


def operands(packed: PackedExperts) -> tuple[Any, ...]:
    """The arrays that decoding kernels take, in this order, before the table."""
    arrays = packed.codes, packed.expert_bases, packed.row_starts, packed.row_values
    if packed.codec == "tunstall":
        return *arrays, packed.trees, packed.sign_starts
    return *arrays, packed.expert_bases, packed.row_starts  # in their place, and never read


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
        "FIELDS": words_of(packed.codec).MAX_NONZEROS,
        "TUNSTALL": packed.codec == "tunstall",
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
    trees,  # uint8 [experts]
    sign_starts,  # uint32 [experts, rows + 1]
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TUNSTALL: tl.constexpr,
):
    """Rows `block * TILE_ROWS` and following; of the expert E they have no words.

    Returns:
      Row and whether it is one of the matrix; the expert's first word (int64) and table entry;
      first word, word past the last, min and max value, first bit of the signs and the one past
      the last of each row.
    """
    coded_rows = tl.where(expert < EXPERTS, ROWS, 0)
    expert = tl.minimum(expert, EXPERTS - 1).to(tl.int64)
    row = block * TILE_ROWS + tl.arange(0, TILE_ROWS)
    inside = row < ROWS
    at = expert * (ROWS + 1) + row
    begin = tl.load(starts + at, mask=row < coded_rows, other=0)
    end = tl.load(starts + at + 1, mask=row < coded_rows, other=0)
    table = 0
    sign = begin
    last_sign = begin
    if TUNSTALL:
        table = tl.load(trees + expert).to(tl.int32) * 65536
        sign = tl.load(sign_starts + at, mask=row < coded_rows, other=0)
        last_sign = tl.load(sign_starts + at + 1, mask=row < coded_rows, other=0)
    at = values + (expert * ROWS + row) * 2
    low = tl.load(at, mask=inside, other=0)
    high = tl.load(at + 1, mask=inside, other=0)
    base = tl.load(bases + expert).to(tl.int64) * 64
    return row, inside, base, table, begin, end, low[:, None], high[:, None], sign, last_sign


@no_type_check
@triton.jit
def read_step(
    i,
    place,  # [rows], the column at which this step begins
    sign,  # [rows], and the bit of its first sign
    base,
    table,
    begin,
    end,
    codes,  # uint16 [WORDS]
    entries,  # uint32
    WORDS: tl.constexpr,
    LANES: tl.constexpr,
    LANE_WORDS: tl.constexpr,
    TUNSTALL: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """Table entries of the words of step `i`.

    Returns:
      A tuple of entries [rows, lanes], 0 where there is no word, and one of their signs from bit 0
      on, if these are apart; the column at which each lane's first word begins; `place` and `sign`
      of the next step.
    """
    lane = (i * LANES + tl.arange(0, LANES)) * LANE_WORDS
    first = begin[:, None] + lane.to(tl.uint32)[None, :]
    at = codes + (base + first.to(tl.int64))
    found = ()
    sums = tl.zeros(first.shape, tl.int32)
    for w in tl.static_range(LANE_WORDS):
        inside = first + w < end[:, None]
        if CHECKED:
            inside &= base + first.to(tl.int64) + w < WORDS
        word = tl.load(at + w, mask=inside, other=0)
        entry = tl.load(entries + (table + word.to(tl.int32)), mask=inside, other=0)
        found = found + (entry,)  # noqa: RUF005, Triton unpacks no tuples
        sums += length(entry, TUNSTALL)
        if TUNSTALL:
            sums += count(entry) << 16  # one prefix sum carries both
    ends = tl.cumsum(sums, axis=1)
    before = ends - sums
    total = tl.max(ends, axis=1)
    if TUNSTALL:
        signs = sign[:, None] + (before >> 16).to(tl.uint32)
        windows = _signs(found, signs, base, codes, WORDS, LANE_WORDS, CHECKED)
        sign += (total >> 16).to(tl.uint32)
        return found, windows, place[:, None] + (before & 0xFFFF), place + (total & 0xFFFF), sign
    return found, found, place[:, None] + before, place + total, sign


@no_type_check
@triton.jit
def _signs(found, sign, base, codes, WORDS: tl.constexpr, LANE_WORDS: tl.constexpr, CHECKED):
    """The signs of each word, from bit 0 on; two units hold those of four words."""
    windows = ()
    window = sign
    for w in tl.static_range(LANE_WORDS):
        if w % 4 == 0:
            unit = base + (sign >> 4).to(tl.int64)
            inside = found[w] > 0
            inside_next = inside
            if CHECKED:
                inside &= unit < WORDS
                inside_next &= unit + 1 < WORDS
            window = tl.load(codes + unit, mask=inside, other=0).to(tl.uint32)
            more = tl.load(codes + unit + 1, mask=inside_next, other=0).to(tl.uint32)
            window = (window | (more << 16)) >> (sign & 15)
        windows = windows + (window,)  # noqa: RUF005
        sign += count(found[w]).to(tl.uint32)
        window = window >> count(found[w]).to(tl.uint32)
    return windows


@no_type_check
@triton.jit
def length(entry, TUNSTALL: tl.constexpr):
    """Of a word, in weights."""
    if TUNSTALL:
        return ((entry >> 21 & 127) + (entry >> 30)).to(tl.int32)
    return (entry & 31).to(tl.int32)


@no_type_check
@triton.jit
def count(entry):
    """Of the non-zeros of a word of "tunstall"."""
    return (entry >> 28).to(tl.int32)


@no_type_check
@triton.jit
def nonzero(entry, window, column, field: tl.constexpr, TUNSTALL: tl.constexpr):
    """Of a word that begins at `column`: where non-zero `field` is, if there, and if it is max."""
    if TUNSTALL:
        position = (entry >> (7 * field) & 127).to(tl.int32)
        return column + position, (entry >> 28) > field, (window >> field & 1) != 0
    bits = entry >> (5 + 6 * field)
    return column + (bits & 31).to(tl.int32), (entry >> 30) > field, (bits & 32) != 0


@no_type_check
@triton.jit
def sound(place, sign, last_sign, outside, expert, COLUMNS, EXPERTS, TUNSTALL: tl.constexpr):
    """Whether the words of each row [rows] are as many as they must be; `outside` are not."""
    if TUNSTALL:
        return (sign == last_sign) & (outside == 0)
    return place == tl.where(expert < EXPERTS, COLUMNS + COLUMNS % 2, 0)
