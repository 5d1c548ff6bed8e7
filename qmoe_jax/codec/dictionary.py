# SPDX-License-Identifier: Apache-2.0
"""The fixed dictionary of the "qmoe" codec (QMoE, arXiv 2310.16795, section 4).

65,536 strings of trit pairs, each named by a 16-bit word: those that a source of independent trits
with 88.5% zeros emits most often. Nothing about it is stored with a model: it is built here, word
for word the same as the published one. Its ORDER depends on how float64 products round, so the
products below are taken in one fixed order.

A pair is a digit 0-8, ``trit[even] + 3 * trit[odd]``. The empty string is the root, every prefix of
a word is a word and every single digit is one: a greedy parse never gets stuck.
"""

import dataclasses
import functools
import heapq

import numpy as np
from jaxtyping import Int32, UInt8, UInt32

from pallas_kernels import dictionary_words

WORDS = 65_536
ROOT = WORDS  # node id of the empty string in `encode_table`
DIGITS = 9
MAX_PAIRS = 14
ZERO_PROBABILITY = 0.885


@dataclasses.dataclass(frozen=True, eq=False)
class Dictionary:
    """Read-only tables of the dictionary.

    Attributes:
      decode_table: as published. Both numbers of a word: bits 0-3 its length in pairs, trit d of
        this half (0-13) at bits 4 + 2d; the second number holds trits 14-27. Unused bits are 0.
      encode_table: the trie. Node ids are words and `ROOT`; -1 where no longer word exists.
      lengths: in pairs.
    """

    decode_table: UInt32[np.ndarray, "words 2"]
    encode_table: Int32[np.ndarray, "nodes 9"]
    lengths: UInt8[np.ndarray, " words"]


@functools.cache
def build() -> Dictionary:
    """The dictionary; built once a process in about a second."""
    parents, digits = _best_first()
    words = np.arange(WORDS)
    encode_table = np.full((WORDS + 1, DIGITS), -1, np.int32)
    encode_table[parents, digits] = words
    decode_table, lengths = _write_out(parents, digits)
    for table in (decode_table, encode_table, lengths):
        table.flags.writeable = False
    return Dictionary(decode_table, encode_table, lengths)


@functools.cache
def nonzero_table() -> UInt32[np.ndarray, " words"]:
    """One uint32 per word for kernels: its length and its at most three non-zeros.

    The layout is `pallas_kernels.dictionary_words.word_entries`'s.
    """
    table = dictionary_words.word_entries(word_trits(), build().lengths * np.uint8(2))
    table.flags.writeable = False
    return table


def word_trits() -> UInt8[np.ndarray, "words 28"]:
    """Every word written out, zero from its length on."""
    shifts = np.arange(4, 32, 2, dtype=np.uint32)
    trits = (build().decode_table[:, :, None] >> shifts) & 3
    return trits.reshape(WORDS, -1).astype(np.uint8)


def _pair_probabilities() -> list[float]:
    other = (1 - ZERO_PROBABILITY) / 2
    single = [ZERO_PROBABILITY, other, other]
    return [single[digit // 3] * single[digit % 3] for digit in range(DIGITS)]


def _best_first() -> tuple[np.ndarray, np.ndarray]:
    """Parent node and last digit of each word, in order of falling probability.

    Equal probabilities go by the digits' lexicographic order, which bytes compare by.
    """
    steps = [(bytes([d]), p) for d, p in enumerate(_pair_probabilities())]
    parents, digits, ids = [], [], {b"": ROOT}
    heap = [(-p, last) for last, p in steps]
    heapq.heapify(heap)
    while len(parents) < WORDS:
        negative_probability, string = heapq.heappop(heap)
        ids[string] = len(parents)
        parents.append(ids[string[:-1]])
        digits.append(string[-1])
        if len(string) < MAX_PAIRS:
            for last, p in steps:
                heapq.heappush(heap, (negative_probability * p, string + last))
    return np.array(parents), np.array(digits)


def _write_out(parents: np.ndarray, digits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`decode_table` and `lengths`, one length after another: a word is its parent and a digit."""
    table = np.zeros((WORDS + 1, 2), np.uint32)
    lengths = np.zeros(WORDS + 1, np.uint8)
    nibbles = (digits % 3 | digits // 3 << 2).astype(np.uint32)
    frontier = np.array([ROOT])
    for depth in range(MAX_PAIRS):
        words = np.flatnonzero(np.isin(parents, frontier))
        half, place = divmod(depth, MAX_PAIRS // 2)
        table[words] = table[parents[words]]
        table[words, half] |= nibbles[words] << np.uint32(4 + 4 * place)
        lengths[words] = depth + 1
        frontier = words
    table |= lengths[:, None]
    return table[:WORDS], lengths[:WORDS]
