# SPDX-License-Identifier: Apache-2.0
"""Ternary experts written out: packed words -> dense matrices, a few experts at a time."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8, UInt32

from pallas_kernels import dictionary_words, tunstall_rows, validation
from pallas_kernels import implementation as implementations
from pallas_kernels.implementation import Implementation
from pallas_kernels.packed import BLOCK_WORDS, PackedExperts

_CHUNK_BLOCKS = 256  # of words; what a step of the reference decodes


def sub1_decode(
    packed: PackedExperts,
    entries: UInt32[Array, " entries"],
    experts: Int[Array, " n"],
    *,
    dtype: DTypeLike = jnp.bfloat16,
    implementation: Implementation = "auto",
) -> Float[Array, "n rows columns"]:
    """Decodes the named experts.

    Args:
      packed: a valid record (`validation.validate`) of one slab.
      entries: the run-time table of its codec (`word_entries` of its words).
      experts: indices; one that is none gives zeros.
      dtype: bfloat16 or float32; the row values are exact in both.
      implementation: see `implementation.resolve`; all give the same bits.

    Raises:
      ValueError: shapes or dtypes that do not fit.
    """
    validation.check_kernel_operands(packed, entries)
    if experts.ndim != 1 or not jnp.issubdtype(experts.dtype, jnp.integer):
        raise ValueError(f"`experts` must be integers [n], got {experts.dtype} {experts.shape}")
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"`dtype` must be float32 or bfloat16, got {jnp.dtype(dtype).name}")
    experts = jnp.where(experts < 0, packed.shape[0], experts)
    match implementations.resolve(implementation):
        case "xla":
            return sub1_decode_xla(packed, entries, experts, dtype)
        case "pallas":
            from pallas_kernels.device import sub1_decode_pallas as device
        case "triton":
            from pallas_kernels.device import sub1_decode_triton as device
    if not experts.shape[0]:
        return jnp.zeros((0, *packed.shape[1:]), dtype)
    return device.sub1_decode(packed, entries, experts, dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def sub1_decode_xla(
    packed: PackedExperts,
    entries: UInt32[Array, " entries"],
    experts: Int[Array, " n"],
    dtype: DTypeLike = jnp.bfloat16,
) -> Float[Array, "n rows columns"]:
    """The reference; one expert after another."""
    count = packed.shape[0]

    def one(expert):
        dense = decode_expert(packed, entries, jnp.minimum(expert, count - 1), dtype)
        return jnp.where(expert < count, dense, jnp.zeros_like(dense))

    return lax.map(one, experts)


def decode_expert(
    packed: PackedExperts,
    entries: UInt32[Array, " entries"],
    expert: Int[Array, ""],
    dtype: DTypeLike,
) -> Float[Array, "rows columns"]:
    """One expert's weights; for programs that XLA compiles."""
    return dequantize(expert_trits(packed, entries, expert), packed.row_values[expert], dtype)


def dequantize(
    trits: UInt8[Array, "*experts rows columns"],
    row_values: Float[Array, "*experts rows 2"],
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*experts rows columns"]:
    """Weights of these trits; exact in bfloat16 and float32."""
    low, high = (row_values[..., i, None].astype(dtype) for i in range(2))
    zero = jnp.zeros((), dtype)
    return jnp.where(trits == 1, low, jnp.where(trits == 2, high, zero))


def expert_trits(
    packed: PackedExperts, entries: UInt32[Array, " entries"], expert: Int[Array, ""]
) -> UInt8[Array, "rows columns"]:
    """One expert's trits; for programs that XLA compiles. Reads stay inside `codes`."""
    trits = tunstall_rows.expert_trits if packed.codec == "tunstall" else _dictionary_trits
    return trits(packed, entries, expert)


def _dictionary_trits(
    packed: PackedExperts, entries: UInt32[Array, " entries"], expert: Int[Array, ""]
) -> UInt8[Array, "rows columns"]:
    """Of the codec "qmoe", chunk of words by chunk.

    Every row expands to the same number of weights, so a running sum of word lengths over the whole
    expert is the place of each word's first weight; rows need no starts. Reads stay inside `codes`
    whatever they hold. Any number of slabs.
    """
    experts_per_slab = packed.expert_bases.shape[0] // packed.codes.shape[0]
    _, rows, columns = packed.shape
    width = columns + columns % 2
    codes_BL = jnp.asarray(packed.codes).reshape(-1, BLOCK_WORDS)
    chunk = min(_CHUNK_BLOCKS, codes_BL.shape[0])
    slab_blocks = codes_BL.shape[0] // packed.codes.shape[0]
    base = packed.expert_bases[expert].astype(jnp.int32) + expert // experts_per_slab * slab_blocks
    words = packed.row_starts[expert, -1]
    lane = jnp.arange(chunk * BLOCK_WORDS, dtype=jnp.uint32)

    def decode_chunk(state):
        block, place, trits = state
        # A chunk that would leave the array begins earlier; what it repeats is masked.
        first = jnp.minimum(base + block, codes_BL.shape[0] - chunk)
        codes = lax.dynamic_slice_in_dim(codes_BL, first, chunk).reshape(-1)
        word = lane + ((first - base) * BLOCK_WORDS).astype(jnp.uint32)  # wraps before the base
        inside = (word >= (block * BLOCK_WORDS).astype(jnp.uint32)) & (word < words)
        inside &= word < jnp.uint32(1 << 31)
        entry = jnp.where(inside, entries[codes.astype(jnp.int32)], jnp.uint32(0))
        length = dictionary_words.entry_length(entry).astype(jnp.int32)
        ends = jnp.cumsum(length)
        begin = place + ends - length
        for field in range(dictionary_words.MAX_NONZEROS):
            position, sign = dictionary_words.entry_nonzero(entry, field)
            present = dictionary_words.entry_has(entry, field)
            target = jnp.where(present, begin + position.astype(jnp.int32), rows * width)
            value = sign.astype(jnp.uint8) + jnp.uint8(1)
            trits = trits.at[target].set(value, mode="drop")
        return block + chunk, place + ends[-1], trits

    state = (jnp.int32(0), jnp.int32(0), jnp.zeros(rows * width, jnp.uint8))
    *_, trits = lax.while_loop(
        lambda state: (state[0] * BLOCK_WORDS).astype(jnp.uint32) < words, decode_chunk, state
    )
    return trits.reshape(rows, width)[:, :columns]
