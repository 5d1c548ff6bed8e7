# SPDX-License-Identifier: Apache-2.0
"""The words of the "qmoe" codec, as kernels look them up: QMoE's dictionary of 65,536 strings.

A row is a string of words and nothing else. An entry of the table is a uint32: 5 bits of length in
weights, then three 6-bit fields in column order, each a 5-bit position and a sign bit (1 = max
value); the topmost 2 bits count the non-zeros, so that "more than f" is one comparison of the whole
entry.
"""

import numpy as np
from jaxtyping import Bool, Integer, UInt8, UInt16, UInt32

from pallas_kernels.packed import HostOrDevice

TABLE_SIZE = 1 << 16
MAX_NONZEROS = 3  # of a word
_FIELD_SHIFT = 5
_FIELD_BITS = 6
_COUNT_SHIFT = 30


def word_entries(
    trits: UInt8[np.ndarray, "words 28"], lengths: UInt8[np.ndarray, " words"]
) -> UInt32[np.ndarray, " words"]:
    """The run-time table of a dictionary: one uint32 per word, laid out as described at the top.

    Args:
      trits: the words written out; zero from a word's length on.
      lengths: in weights (trits), at most 31.

    Raises:
      ValueError: a word has more than three non-zeros or is too long for its field.
    """
    if (counts := np.count_nonzero(trits, axis=1)).max(initial=0) > MAX_NONZEROS:
        raise ValueError(f"`trits` has a word of {counts.max()} non-zeros; an entry holds 3")
    if lengths.max(initial=0) > 31:
        raise ValueError(f"`lengths` has a word of {lengths.max()} weights; an entry holds 31")
    entries = lengths.astype(np.uint32) | counts.astype(np.uint32) << _COUNT_SHIFT
    words, positions = np.nonzero(trits)
    # `nonzero` goes word by word: a non-zero's field is its distance from its word's first one.
    field = np.arange(len(words)) - (np.cumsum(counts) - counts)[words]
    sign = trits[words, positions] == 2
    value = positions.astype(np.uint32) | sign.astype(np.uint32) << 5
    np.bitwise_or.at(
        entries, words, value << (_FIELD_SHIFT + _FIELD_BITS * field).astype(np.uint32)
    )
    return entries


def entry_length(entry: UInt32[HostOrDevice, "*n"]) -> UInt32[HostOrDevice, "*n"]:
    """Length in weights of the words behind these table entries."""
    return entry & 31


def entry_count(entry: UInt32[HostOrDevice, "*n"]) -> UInt32[HostOrDevice, "*n"]:
    """Number of non-zeros, 0 to 3."""
    return entry >> _COUNT_SHIFT


def entry_has(entry: UInt32[HostOrDevice, "*n"], field: int) -> Bool[HostOrDevice, "*n"]:
    """Whether there is a non-zero `field` (0 to 2)."""
    return entry >= np.uint32(field + 1 << _COUNT_SHIFT)


def entry_nonzero(
    entry: UInt32[HostOrDevice, "*n"], field: int
) -> tuple[UInt32[HostOrDevice, "*n"], UInt32[HostOrDevice, "*n"]]:
    """Position inside the word and sign (1 = max value) of non-zero `field`; 0, 0 where absent."""
    value = entry >> (_FIELD_SHIFT + _FIELD_BITS * field)
    return value & 31, (value >> 5) & 1


def check_rows(
    words: UInt16[np.ndarray, " words"],
    row_starts: Integer[np.ndarray, " starts"],
    columns: int,
    entries: UInt32[np.ndarray, " table"],
) -> None:
    """Checks that each row of an expert expands to its columns, padded to an even number by a zero.

    Args:
      words: of all rows.
      row_starts: from 0 on, never falling; the last is the number of words.
      columns: of the matrix.
      entries: the table of the words.

    Raises:
      ValueError: naming the first row at fault.
    """
    if (np.diff(row_starts) < 1).any():
        row = int(np.argmax(np.diff(row_starts) < 1))
        raise ValueError(f"row {row}: `row_starts` must begin at 0 and rise by at least one word")
    entry = entries[words]
    length = entry_length(entry).astype(np.uint8)
    weights = np.add.reduceat(length, row_starts[:-1], dtype=np.int64)
    width = columns + columns % 2
    if (wrong := np.flatnonzero(weights != width)).size:
        row = wrong[0]
        raise ValueError(f"row {row}: words expand to {weights[row]} weights, expected {width}")
    if columns % 2:
        last = entry[row_starts[1:] - 1]
        fields = [entry_nonzero(last, i)[0] + 1 == entry_length(last) for i in range(MAX_NONZEROS)]
        present = [entry_has(last, i) for i in range(MAX_NONZEROS)]
        if (wrong := np.flatnonzero((np.array(fields) & np.array(present)).any(axis=0))).size:
            raise ValueError(f"row {wrong[0]}: the weight that pads an odd width is not zero")
