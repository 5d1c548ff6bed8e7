# SPDX-License-Identifier: Apache-2.0
"""Rows of "tunstall" words (`tunstall_words`) in plain JAX, for programs that XLA compiles."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, UInt8, UInt32

from pallas_kernels import tunstall_words as words_lib
from pallas_kernels.packed import BLOCK_WORDS, PackedExperts
from pallas_kernels.tunstall_words import MAX_NONZEROS, UNIT_BITS, WORDS

_STEP = 16  # words of a row


def expert_trits(
    packed: PackedExperts, entries: UInt32[Array, " entries"], expert: Int[Array, ""]
) -> UInt8[Array, "rows columns"]:
    """One expert's trits, all rows side by side, a few words of each at a time.

    Reads stay inside `codes` whatever they hold. Any number of slabs.
    """
    _, rows, columns = packed.shape
    codes_BL = jnp.asarray(packed.codes).reshape(-1, BLOCK_WORDS)
    experts_per_slab = packed.expert_bases.shape[0] // packed.codes.shape[0]
    slab_blocks = codes_BL.shape[0] // packed.codes.shape[0]
    base = packed.expert_bases[expert].astype(jnp.int32) + expert // experts_per_slab * slab_blocks
    begin_R1, end_R1 = packed.row_starts[expert, :-1, None], packed.row_starts[expert, 1:, None]
    first_entry = jnp.asarray(packed.trees)[expert].astype(jnp.int32) * WORDS
    row_R1 = jnp.arange(rows)[:, None]

    def units_at(offset):
        block = jnp.minimum(base + (offset >> 6).astype(jnp.int32), codes_BL.shape[0] - 1)
        return codes_BL[block, (offset & (BLOCK_WORDS - 1)).astype(jnp.int32)].astype(jnp.uint32)

    def step(state):
        first_R1, place_R1, sign_R1, trits = state
        at_RW = first_R1 + jnp.arange(_STEP, dtype=jnp.uint32)[None, :]
        words_RW = units_at(jnp.minimum(at_RW, end_R1)).astype(jnp.int32)
        entry_RW = jnp.where(at_RW < end_R1, entries[first_entry + words_RW], jnp.uint32(0))
        length_RW, count_RW = words_lib.entry_length(entry_RW), words_lib.entry_count(entry_RW)
        begin_RW = place_R1 + jnp.cumsum(length_RW, axis=1) - length_RW
        sign_RW = sign_R1 + jnp.cumsum(count_RW, axis=1) - count_RW
        unit_RW = sign_RW // UNIT_BITS
        signs_RW = units_at(unit_RW) | units_at(unit_RW + 1) << UNIT_BITS
        signs_RW >>= sign_RW % UNIT_BITS
        for field in range(MAX_NONZEROS):
            column = begin_RW + words_lib.entry_position(entry_RW, field)
            present = words_lib.entry_has(entry_RW, field) & (column < columns)
            target = jnp.where(present, row_R1 * columns + column.astype(jnp.int32), trits.size)
            value = (signs_RW >> field & 1).astype(jnp.uint8) + jnp.uint8(1)
            trits = trits.at[target].set(value, mode="drop")
        place_R1 += length_RW.sum(axis=1, keepdims=True, dtype=jnp.uint32)
        sign_R1 += count_RW.sum(axis=1, keepdims=True, dtype=jnp.uint32)
        return first_R1 + _STEP, place_R1, sign_R1, trits

    sign_R1 = jnp.asarray(packed.sign_starts)[expert, :-1, None]
    state = begin_R1, jnp.zeros_like(begin_R1), sign_R1, jnp.zeros(rows * columns, jnp.uint8)
    *_, trits = lax.while_loop(lambda state: (state[0] < end_R1).any(), step, state)
    return trits.reshape(rows, columns)
