# SPDX-License-Identifier: Apache-2.0
"""Slow codecs in plain Python and NumPy, written from the published description.

They share no code with the package: words are byte strings in a plain dict, the greedy parse tries
the longest slice first, and bit fields are read one by one.
"""

import functools
import heapq

import numpy as np


@functools.cache
def words() -> list[bytes]:
    """The 65,536 strings of pair digits in published order, best first."""
    single = {0: 0.885, 1: (1 - 0.885) / 2, 2: (1 - 0.885) / 2}
    pairs = []
    for first in range(3):
        for second in range(3):
            pairs.append(1.0 * single[first] * single[second])
    accepted, heap = [], [(-1.0, [])]
    while len(accepted) < 65_536:
        negative, string = heapq.heappop(heap)
        if string:
            accepted.append(bytes(string))
        if len(string) == 14:
            continue
        for digit in range(9):
            heapq.heappush(heap, (negative * pairs[digit], [*string, digit]))
    return accepted


@functools.cache
def _word_ids() -> dict[bytes, int]:
    return {string: number for number, string in enumerate(words())}


def encode_row(trits: np.ndarray) -> list[int]:
    """Greedy longest match over one row; an odd width is padded by one zero."""
    padded = [int(t) for t in trits] + [0] * (len(trits) % 2)
    digits = bytes(padded[i] + 3 * padded[i + 1] for i in range(0, len(padded), 2))
    ids, found, at = _word_ids(), [], 0
    while at < len(digits):
        length = next(n for n in range(14, 0, -1) if digits[at : at + n] in ids)
        # A slice past the end is shorter than asked for, hence the slice's own length below.
        match = digits[at : at + length]
        found.append(ids[match])
        at += len(match)
    return found


def decode_row(row_words: list[int] | np.ndarray, columns: int) -> np.ndarray:
    """The trits behind these words."""
    digits = b"".join(words()[int(word)] for word in row_words)
    trits = [trit for digit in digits for trit in (digit % 3, digit // 3)]
    assert len(trits) == columns + columns % 2
    return np.array(trits[:columns], np.uint8)


def encode_matrix(trits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`w_comp` and `row_off` of one matrix in the published layout."""
    rows = [encode_row(row) for row in trits]
    ends = np.cumsum([0] + [len(row) for row in rows])
    return np.array([word for row in rows for word in row], np.uint16), ends.astype(np.int32)


def random_trits(seed: int, shape: tuple[int, ...], p0: float) -> np.ndarray:
    """Independent trits, drawn as the goldens in `data/qmoe/codec.json` were."""
    probabilities = [p0, (1 - p0) / 2, (1 - p0) / 2]
    rng = np.random.default_rng(seed)
    return rng.choice(3, size=shape, p=probabilities).astype(np.uint8)


def plane_levels(codes: np.ndarray, columns: int) -> np.ndarray:
    """Levels of one row of bit planes `[chunks, bits]`, bit by bit."""
    chunks, bits = codes.shape
    levels = [
        sum((int(codes[c // 32, bit]) >> (c % 32) & 1) << bit for bit in range(bits))
        for c in range(32 * chunks)
    ]
    return np.array(levels[:columns], np.uint8)


@functools.cache
def tree_leaves(zero_cost: int, nonzero_cost: int) -> list[str]:
    """The strings of "tunstall" words in order, grown one node at a time; 0 zero, 1 non-zero."""
    heap, leaves, inner = [(0, 0, 0, "")], [], 0
    while inner < 65_535:
        cost, nonzeros, _, string = heapq.heappop(heap)
        if nonzeros == 4 or len(string) == 127:
            leaves.append(string)
            continue
        inner += 1
        for symbol, more in (("0", zero_cost), ("1", nonzero_cost)):
            count = nonzeros + (symbol == "1")
            # Of one class all strings are of one length: as numbers they compare as strings do.
            number = int(string + symbol, 2)
            heapq.heappush(heap, (cost + more, count, number, string + symbol))
    return sorted([*leaves, *(string for *_, string in heap)])


def encode_by_tree(trits: np.ndarray, costs: tuple[int, int]) -> tuple[list[list[int]], list[int]]:
    """Words of each row and the signs of all rows."""
    leaves = tree_leaves(*costs)
    ids = {string: number for number, string in enumerate(leaves)}
    rows, signs = [], []
    for row in trits:
        string = "".join("0" if trit == 0 else "1" for trit in row).rstrip("0")
        signs += [int(trit == 2) for trit in row if trit]
        words, at = [], 0
        while at < len(string):
            rest = string[at:] + "0" * 127
            length = next(n for n in range(1, 128) if rest[:n] in ids)
            words.append(ids[rest[:length]])
            at += length
        rows.append(words)
    return rows, signs
