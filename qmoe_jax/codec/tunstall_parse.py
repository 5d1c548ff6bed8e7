# SPDX-License-Identifier: Apache-2.0
"""Trits to words and signs of the "tunstall" codec; rows are as `tunstall_words` has them.

Rows are parsed all at once, four columns a step: the state of a row is an inner node of its
expert's tree.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int32, UInt8, UInt16, UInt32

from pallas_kernels.tunstall_words import TREES, UNIT_BITS
from qmoe_jax.codec import tunstall
from qmoe_jax.codec.tunstall import STRIDE


class Parsed(NamedTuple):
    """A group of experts, parsed; S = steps, the last being what is left when a row ends.

    Attributes:
      words: the word that ends in each step, if one does.
      ends: whether one does.
      signs: of each 16 columns, the non-zeros' signs from bit 0 on, without gaps.
      sign_counts: how many these are.
      row_words: of each row; words after these are of the zeros that end it.
      nonzeros: of each row.
      trees: of each expert.
    """

    words: UInt16[Array, "S experts rows"]
    ends: Bool[Array, "S experts rows"]
    signs: UInt16[Array, "units experts rows"]
    sign_counts: UInt8[Array, "units experts rows"]
    row_words: Int32[Array, "experts rows"]
    nonzeros: Int32[Array, "experts rows"]
    trees: UInt8[Array, " experts"]


def parse(trits: UInt8[Array, "experts rows columns"]) -> Parsed:
    """Parses all rows of each expert by the tree that suits it best."""
    masks_BER, signs_BER, nonzeros_E = _bits(trits)
    weights = trits.shape[1] * trits.shape[2]
    trees = [tunstall.best_tree(weights - n, n) for n in np.asarray(nonzeros_E).tolist()]
    return _parse(masks_BER, signs_BER, np.array(trees, np.uint8), *_tables())


@functools.partial(jax.jit, static_argnames="size")
def write(
    parsed: Parsed,
    first_ER: Int32[Array, "experts rows"],
    sign_unit_ER: Int32[Array, "experts rows"],
    sign_bit_ER: Int32[Array, "experts rows"],
    size: int,
) -> UInt16[Array, " size"]:
    """Every row's words from its first place on, and its signs from a first bit on.

    Args:
      parsed: the experts.
      first_ER: the place of each row's first word.
      sign_unit_ER, sign_bit_ER: the place of each row's first sign, and the bit there. Rows may
        share a unit.
      size: units to be written.
    """
    codes = jnp.zeros(size, jnp.uint16)
    stop_ER = first_ER + parsed.row_words

    def write_word(state, step):
        codes, position_ER = state
        word_ER, ends_ER = step
        target_ER = jnp.where(ends_ER & (position_ER < stop_ER), position_ER, size)
        return (
            codes.at[target_ER].set(word_ER, mode="drop"),
            position_ER + ends_ER.astype(jnp.int32),
        ), None

    (codes, _), _ = lax.scan(write_word, (codes, first_ER), (parsed.words, parsed.ends))

    def write_signs(state, step):
        codes, unit_ER, open_ER, filled_ER = state
        signs_ER, added_ER = (part.astype(jnp.uint32) for part in step)
        open_ER |= signs_ER << filled_ER
        filled_ER += added_ER
        is_full_ER = filled_ER >= UNIT_BITS
        target_ER = jnp.where(is_full_ER, unit_ER, size)
        codes = codes.at[target_ER].add(open_ER.astype(jnp.uint16), mode="drop")
        open_ER = jnp.where(is_full_ER, open_ER >> UNIT_BITS, open_ER)
        filled_ER = jnp.where(is_full_ER, filled_ER - UNIT_BITS, filled_ER)
        return (codes, unit_ER + is_full_ER.astype(jnp.int32), open_ER, filled_ER), None

    filled_ER = sign_bit_ER.astype(jnp.uint32)
    state = codes, sign_unit_ER, jnp.zeros_like(filled_ER), filled_ER
    state, _ = lax.scan(write_signs, state, (parsed.signs, parsed.sign_counts))
    codes, unit_ER, open_ER, _ = state
    return codes.at[unit_ER].add(open_ER.astype(jnp.uint16), mode="drop")  # 0 past the end


@jax.jit
def _bits(
    trits_ERC: UInt8[Array, "experts rows columns"],
) -> tuple[
    UInt8[Array, "bytes experts rows"], UInt8[Array, "bytes experts rows"], Int32[Array, " experts"]
]:
    """Of 8 columns each: which are not zero, which are 2. And the non-zeros of each expert."""
    padded = jnp.pad(trits_ERC, ((0, 0), (0, 0), (0, -trits_ERC.shape[2] % UNIT_BITS)))
    masks_BER, signs_BER = (
        jnp.moveaxis(jnp.packbits(of, axis=2, bitorder="little"), 2, 0)
        for of in (padded > 0, padded > 1)
    )
    counts_BER = lax.population_count(masks_BER)
    return masks_BER, signs_BER, counts_BER.sum(axis=(0, 2), dtype=jnp.int32)


@jax.jit
def _parse(
    masks_BER: UInt8[Array, "bytes experts rows"],
    signs_BER: UInt8[Array, "bytes experts rows"],
    trees_E: UInt8[Array, " experts"],
    steps: UInt32[Array, " steps"],
    tails: UInt32[Array, " nodes"],
    gathered: UInt8[Array, " masks_and_signs"],
) -> Parsed:
    _, experts, rows = masks_BER.shape
    digits_SER = jnp.stack([masks_BER & 15, masks_BER >> 4], 1).reshape(-1, experts, rows)
    tree_E1 = trees_E.astype(jnp.int32)[:, None]
    first_step_E1, first_tail_E1 = (tree_E1 * (table.size // TREES) for table in (steps, tails))

    def read(state, digit_ER):
        node_ER, words_ER, kept_ER = state
        found_ER = steps[first_step_E1 + (node_ER << STRIDE) + digit_ER.astype(jnp.int32)]
        ended_ER = found_ER >> 31 != 0
        low_ER = found_ER & 0xFFFF
        node_ER = jnp.where(ended_ER, found_ER >> 16 & 15, low_ER).astype(jnp.int32)
        words_ER += ended_ER.astype(jnp.int32)
        # Word 0 is all zeros; a row ends with its last other one.
        kept_ER = jnp.where(ended_ER & (low_ER > 0), words_ER, kept_ER)
        return (node_ER, words_ER, kept_ER), (low_ER.astype(jnp.uint16), ended_ER)

    none_ER = jnp.zeros((experts, rows), jnp.int32)
    state, (words_SER, ends_SER) = lax.scan(read, (none_ER, none_ER, none_ER), digits_SER)
    node_ER, words_ER, kept_ER = state
    tail_ER = tails[first_tail_E1 + node_ER]
    has_tail_ER = tail_ER >> 31 == 0
    words_SER = jnp.concatenate([words_SER, tail_ER[None].astype(jnp.uint16)])
    ends_SER = jnp.concatenate([ends_SER, has_tail_ER[None]])
    kept_ER = jnp.where(has_tail_ER, words_ER + 1, kept_ER)
    # Signs of 8 columns, and then of 16.
    counts_BER = lax.population_count(masks_BER)
    signs_BER = gathered[masks_BER.astype(jnp.int32) << 8 | signs_BER.astype(jnp.int32)].astype(
        jnp.uint16
    )
    signs_UER = signs_BER[::2] | signs_BER[1::2] << counts_BER[::2].astype(jnp.uint16)
    counts_UER = counts_BER[::2] + counts_BER[1::2]
    nonzeros_ER = counts_UER.sum(axis=0, dtype=jnp.int32)
    return Parsed(words_SER, ends_SER, signs_UER, counts_UER, kept_ER, nonzeros_ER, trees_E)


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`parse_table` and `tail_words` of all trees, and `_gathered`."""
    steps, tails = (
        np.concatenate([table(tree) for tree in range(TREES)])
        for table in (tunstall.parse_table, tunstall.tail_words)
    )
    return steps, tails, _gathered()


def _gathered() -> UInt8[np.ndarray, " masks_and_signs"]:
    """Of a mask of 8 bits (high byte), the bits of the low byte where it is set, without gaps."""
    index = np.arange(1 << 16)
    masks, signs = index >> 8, index & 255
    found, count = np.zeros((2, len(index)), np.int64)
    for bit in range(8):
        is_set = masks >> bit & 1
        found |= (signs >> bit & is_set) << count
        count += is_set
    return found.astype(np.uint8)
