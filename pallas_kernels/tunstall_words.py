# SPDX-License-Identifier: Apache-2.0
"""The words of the "tunstall" codec: how an expert is laid out, and a kernel's table of the words.

An expert is a string of 16-bit units: the words of its rows, which tell where the non-zeros are,
and behind them the signs of all its non-zeros, row by row, 16 a unit from bit 0 on (1 = the row's
max value). A row's last word may reach past its end, and zeros that end a row have no words. The
signs of a row begin where `PackedExperts.sign_starts` says; a store need not keep that, for words
tell how many signs they have.

There are several tables of words (`codec.tunstall`), and an expert uses one of them. An entry is a
uint32: four 7-bit positions of non-zeros in the word, then 3 bits with their number; where there
are fewer than four, the last of the positions is the word's length, else the word ends with the
last non-zero.
"""

import numpy as np
from jaxtyping import Bool, Integer, UInt8, UInt16, UInt32

from pallas_kernels.packed import HostOrDevice

WORDS = 1 << 16
TREES = 4  # tables
TABLE_SIZE = TREES * WORDS  # of all, one after another
MAX_NONZEROS = 4  # of a word
MAX_LENGTH = 127  # weights of a word
UNIT_BITS = 16
_POSITION_BITS = 7
_LAST_SHIFT = _POSITION_BITS * (MAX_NONZEROS - 1)
_COUNT_SHIFT = _POSITION_BITS * MAX_NONZEROS


def word_entries(
    positions: UInt8[np.ndarray, "words 4"], lengths: UInt8[np.ndarray, " words"]
) -> UInt32[np.ndarray, " words"]:
    """The run-time table of some words.

    Args:
      positions: of each word's non-zeros, rising; `MAX_LENGTH` where there is none.
      lengths: in weights, at most `MAX_LENGTH`; a word of four non-zeros ends with the last.
    """
    counts = (positions < MAX_LENGTH).sum(axis=1)
    fields = np.where(positions < MAX_LENGTH, positions, 0).astype(np.uint32)
    fields[:, -1] = np.where(counts == MAX_NONZEROS, fields[:, -1], lengths)
    shifts = np.arange(0, _COUNT_SHIFT, _POSITION_BITS, dtype=np.uint32)
    shifted = np.bitwise_or.reduce(fields << shifts, axis=1)
    return shifted | counts.astype(np.uint32) << np.uint32(_COUNT_SHIFT)


def entry_length(entry: UInt32[HostOrDevice, "*n"]) -> UInt32[HostOrDevice, "*n"]:
    """Length in weights of the words behind these table entries."""
    return ((entry >> _LAST_SHIFT) & MAX_LENGTH) + (entry >> (_COUNT_SHIFT + 2))


def entry_count(entry: UInt32[HostOrDevice, "*n"]) -> UInt32[HostOrDevice, "*n"]:
    """Number of non-zeros, 0 to 4."""
    return entry >> _COUNT_SHIFT


def entry_has(entry: UInt32[HostOrDevice, "*n"], field: int) -> Bool[HostOrDevice, "*n"]:
    """Whether there is a non-zero `field` (0 to 3)."""
    return entry >= np.uint32(field + 1 << _COUNT_SHIFT)


def entry_position(entry: UInt32[HostOrDevice, "*n"], field: int) -> UInt32[HostOrDevice, "*n"]:
    """Position inside the word of non-zero `field`, if there is one."""
    return (entry >> (_POSITION_BITS * field)) & MAX_LENGTH


def sign_starts(
    nonzeros: Integer[np.ndarray, "experts rows"], words: Integer[np.ndarray, " experts"]
) -> UInt32[np.ndarray, "experts starts"]:
    """Where the signs of each row begin, and the last ones end, in bits from the expert's base.

    Args:
      nonzeros: of each row.
      words: of each expert.

    Raises:
      ValueError: an expert of 2**32 bits or more.
    """
    ends = np.pad(np.cumsum(nonzeros, axis=1, dtype=np.int64), ((0, 0), (1, 0)))
    starts = UNIT_BITS * words.astype(np.int64)[:, None] + ends
    if starts.max() >= 2**32:
        raise ValueError(f"an expert of {starts.max()} bits is too large: its offsets are uint32")
    return starts.astype(np.uint32)


def row_nonzeros(
    words: UInt16[np.ndarray, " words"],
    row_starts: Integer[np.ndarray, " starts"],
    entries: UInt32[np.ndarray, " table"],
) -> Integer[np.ndarray, " rows"]:
    """Non-zeros of each row of an expert, by its words and their table."""
    sums = np.pad(np.cumsum(entry_count(entries)[words], dtype=np.int64), (1, 0))
    return np.diff(sums[row_starts])


def check_rows(
    words: UInt16[np.ndarray, " words"],
    row_starts: Integer[np.ndarray, " starts"],
    columns: int,
    entries: UInt32[np.ndarray, " table"],
) -> None:
    """Checks that no word of an expert reaches past its row but by zeros.

    Args:
      words: of all rows.
      row_starts: from 0 on, never falling; the last is the number of words.
      columns: of the matrix.
      entries: the expert's table.

    Raises:
      ValueError: naming the first row at fault.
    """
    row = np.repeat(np.arange(len(row_starts) - 1), np.diff(row_starts))
    entry = entries[words]
    length = np.asarray(entry_length(entry), np.int64)
    begin = np.cumsum(length) - length
    begin -= begin[row_starts[row]]
    count = np.asarray(entry_count(entry), np.int64)
    last = np.choose(
        np.maximum(count, 1) - 1, [entry_position(entry, f) for f in range(MAX_NONZEROS)]
    )
    end = begin + np.where(count > 0, last.astype(np.int64), 0)
    if (wrong := row[end >= columns]).size:
        raise ValueError(f"row {wrong[0]}: a word reaches past its {columns} columns")
