# SPDX-License-Identifier: Apache-2.0
"""Trits to words of the "qmoe" dictionary (QMoE, arXiv 2310.16795, section 4).

Every row is a string of its own: its trits are taken in pairs (an odd width ends in one extra zero)
and parsed greedily into the longest words there are. Rows are parsed all at once, one pair a step:
the state of a row is a node of the trie.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32, UInt8, UInt16

from qmoe_jax.codec import dictionary


class Parsed(NamedTuple):
    """A group of experts, parsed.

    Attributes:
      words: the word read so far at each pair.
      ends: whether it ends there.
      row_words: how many each row has.
    """

    words: UInt16[Array, "pairs experts rows"]
    ends: Bool[Array, "pairs experts rows"]
    row_words: Int32[Array, "experts rows"]


def parse(trits: UInt8[Array, "experts rows columns"]) -> Parsed:
    """Greedy parse of all rows."""
    return Parsed(*_parse(trits, dictionary.build().encode_table))


@functools.partial(jax.jit, static_argnames="size")
def write(
    parsed: Parsed, first_ER: Int32[Array, "experts rows"], size: int
) -> UInt16[Array, " size"]:
    """Every row's words, one after another from the row's first place on.

    Each pair writes the word read so far where the row stands, over the word's own prefixes, and
    the row moves on where the word ends. On a CPU nine times as fast as one scatter of all pairs.
    """

    def write_word(state, step):
        codes, position_ER = state
        word_ER, ends_ER = step
        codes = codes.at[position_ER].set(word_ER, mode="promise_in_bounds", unique_indices=True)
        return (codes, position_ER + ends_ER.astype(jnp.int32)), None

    start = jnp.zeros(size, jnp.uint16), first_ER
    (codes, _), _ = lax.scan(write_word, start, (parsed.words, parsed.ends))
    return codes


@jax.jit
def _parse(
    trits_ERC: UInt8[Array, "experts rows columns"], encode_table: Int32[Array, "nodes 9"]
) -> tuple[
    UInt16[Array, "pairs experts rows"],
    Bool[Array, "pairs experts rows"],
    Int32[Array, "experts rows"],
]:
    experts, rows, columns = trits_ERC.shape
    padded = jnp.pad(trits_ERC, ((0, 0), (0, 0), (0, columns % 2)))
    pairs = padded.reshape(experts, rows, -1, 2)
    digits_PER = jnp.moveaxis(pairs[..., 0] + 3 * pairs[..., 1], 2, 0)

    def read_pair(node_ER, digit_ER):
        digit_ER = digit_ER.astype(jnp.int32)
        child = encode_table[node_ER, digit_ER]
        word_is_over = child < 0
        node = jnp.where(word_is_over, encode_table[dictionary.ROOT, digit_ER], child)
        return node, (node.astype(jnp.uint16), word_is_over)

    root = jnp.full((experts, rows), dictionary.ROOT, jnp.int32)
    _, (words_PER, begins_PER) = lax.scan(read_pair, root, digits_PER)
    # A word ends where the next pair begins one, and at the row's last pair: its prefix is a word.
    ends_PER = jnp.concatenate([begins_PER[1:], jnp.ones((1, experts, rows), bool)])
    return words_PER, ends_PER, ends_PER.sum(axis=0, dtype=jnp.int32)
