# SPDX-License-Identifier: Apache-2.0
"""Trits to `PackedExperts` and back: the "qmoe" codec (QMoE, arXiv 2310.16795, section 4).

Every row is a string of its own: its trits are taken in pairs (an odd width ends in one extra zero)
and parsed greedily into the longest words of the dictionary. Rows are parsed all at once, one pair
a step: the state of a row is a node of the trie. `pallas_kernels.sub1_decode` reads them again.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, BFloat16, Bool, Float, Int, Int32, UInt8, UInt16, UInt32

from pallas_kernels import packed as packed_lib
from pallas_kernels import sub1_decode
from pallas_kernels.packed import HostOrDevice, PackedExperts
from qmoe_jax.codec import dictionary

CODEC = "qmoe"


@dataclasses.dataclass(frozen=True, eq=False)
class PublishedMatrix:
    """One matrix as the authors' checkpoints hold it (there `w_comp` is stored as int16)."""

    w_comp: UInt16[np.ndarray, " words"]
    row_off: Int32[np.ndarray, " rows_and_end"]
    ter_minmax: BFloat16[np.ndarray, " values"]  # min and max of row 0, of row 1, ...


def pack_ternary(
    trits: UInt8[HostOrDevice, "experts rows columns"],
    row_values: Float[HostOrDevice, "experts rows 2"],
) -> PackedExperts:
    """Packs a group of experts; about 4 bytes of working memory a weight.

    A trit whose row value is 0 is stored as trit 0: it decodes to the same weight, and a row whose
    min (or max) is 0 would otherwise spend up to 8 bits on each of its zeros.

    Args:
      trits: 0 = zero, 1 = the row's min, 2 = its max.
      row_values: min and max of each row, finite and exact in bfloat16.

    Returns:
      A record of one slab, on the default device. The slab is padded to one of a few sizes, so that
      code compiled for one group serves the next.

    Raises:
      ValueError: an empty matrix, a trit above 2, row values of another shape or that bfloat16
        cannot hold, or a group so large (about 2**30 pairs of trits) that positions could overflow.
    """
    experts, rows, columns = trits.shape
    pairs = experts * rows * ((columns + 1) // 2)
    if not 0 < pairs < 2**30 - packed_lib.BLOCK_WORDS * experts:
        raise ValueError(
            f"`trits` of {trits.shape} is empty or too large for one call (limit: 2**30 pairs"
            " of trits): pack fewer experts at a time"
        )
    if row_values.shape != (experts, rows, 2):
        raise ValueError(f"`row_values` must be {(experts, rows, 2)}, got {row_values.shape}")
    values = _exact_bfloat16(row_values)
    words, ends, counts, highest = _parse(trits, values, dictionary.build().encode_table)
    if int(highest) > 2:
        raise ValueError(f"`trits` must be 0, 1 or 2, got {int(highest)}")
    row_starts = np.zeros((experts, rows + 1), np.uint32)
    np.cumsum(np.asarray(counts), axis=1, out=row_starts[:, 1:])
    bases, size = packed_lib.expert_layout(row_starts[:, -1])
    first = bases[:, None].astype(np.int64) * packed_lib.BLOCK_WORDS + row_starts[:, :-1]
    codes = _compact(words, ends, first.astype(np.int32), _bucket(size))
    on_device = map(jnp.asarray, (codes[None], bases, row_starts, values))
    return PackedExperts(*on_device, shape=(experts, rows, columns), codec=CODEC)


def unpack_ternary(
    packed: PackedExperts, first: int | Int[Array, ""] = 0, count: int | None = None
) -> UInt8[Array, "count rows columns"]:
    """The trits of experts ``[first, first + count)``; by default of all.

    Jitted, and traceable inside other programs; `first` may be a traced index. Reads stay inside
    `codes` whatever they hold, but only a valid record (`pallas_kernels.packed.validate`) gives
    meaningful trits.

    Raises:
      ValueError: a record of another codec, or a static range that leaves the record.
    """
    if packed.codec != CODEC:
        raise ValueError(f"`packed` is of codec {packed.codec!r}, expected {CODEC!r}")
    experts = packed.expert_bases.shape[0]
    size = experts if count is None else count
    if isinstance(first, int) and not 0 <= first < first + size <= experts:
        raise ValueError(f"experts [{first}, {first + size}) are not a part of {experts} experts")
    index = jnp.asarray(first, jnp.int32)
    return _write_out(packed, index, size, jnp.asarray(dictionary.nonzero_table()))


def to_published(packed: PackedExperts, expert: int) -> PublishedMatrix:
    """One expert in the published layout (copies)."""
    one = packed_lib.expert_slice(packed, expert, 1)
    words = packed_lib.expert_words(one, 0).copy()
    return PublishedMatrix(
        words, np.asarray(one.row_starts[0], np.int32), np.asarray(one.row_values).reshape(-1)
    )


def from_published(matrix: PublishedMatrix, columns: int) -> PackedExperts:
    """A validated record of one expert; `columns` is not stored in the published layout.

    Raises:
      ValueError: the words do not expand to `columns` weights a row, or offsets are damaged.
    """
    words = len(matrix.w_comp)
    if (matrix.row_off < 0).any() or matrix.row_off[-1:].tolist() != [words]:
        raise ValueError(
            f"`row_off` must not be negative and must end at the {words} words of `w_comp`, got"
            f" {matrix.row_off}"
        )
    row_values = matrix.ter_minmax.reshape(1, -1, 2)
    row_starts = matrix.row_off[None].astype(np.uint32)
    packed = packed_lib.assemble([matrix.w_comp], row_starts, row_values, columns, CODEC)
    packed_lib.validate(packed, dictionary.nonzero_table())
    return packed


def _exact_bfloat16(
    row_values: Float[HostOrDevice, "experts rows 2"],
) -> BFloat16[np.ndarray, "experts rows 2"]:
    given = np.asarray(row_values)
    rounded = given.astype(jnp.bfloat16)
    exact = np.isfinite(given.astype(np.float64)) & (rounded.astype(given.dtype) == given)
    if not exact.all():
        expert, row, which = np.argwhere(~exact)[0]
        raise ValueError(
            f"`row_values` of expert {expert}, row {row}: {given[expert, row, which]} is not a"
            " finite bfloat16; round the grid before the weights are quantized to it"
        )
    return rounded


def _bucket(words: int) -> int:
    """Rounds up to one of 4 sizes an octave (at most 25% more), a multiple of 64."""
    step = max(packed_lib.BLOCK_WORDS, 2 ** max(words.bit_length() - 3, 0))
    return -(-words // step) * step


@jax.jit
def _parse(
    trits_ERC: UInt8[Array, "experts rows columns"],
    row_values_ER2: BFloat16[Array, "experts rows 2"],
    encode_table: Int32[Array, "nodes 9"],
) -> tuple[
    UInt16[Array, "pairs experts rows"],
    Bool[Array, "pairs experts rows"],
    Int32[Array, "experts rows"],
    UInt8[Array, ""],
]:
    """Greedy parse of all rows: the word read so far at each pair, and whether it ends there.

    Also the words of each row and the highest trit seen.
    """
    experts, rows, columns = trits_ERC.shape
    is_zero_ER2 = row_values_ER2 == 0
    is_zero_ERC = ((trits_ERC == 1) & is_zero_ER2[..., :1]) | (
        (trits_ERC == 2) & is_zero_ER2[..., 1:]
    )
    coded_ERC = jnp.where(is_zero_ERC, jnp.uint8(0), trits_ERC)
    padded = jnp.pad(coded_ERC, ((0, 0), (0, 0), (0, columns % 2)))
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
    return words_PER, ends_PER, ends_PER.sum(axis=0, dtype=jnp.int32), trits_ERC.max()


@functools.partial(jax.jit, static_argnames="size")
def _compact(
    words_PER: UInt16[Array, "pairs experts rows"],
    ends_PER: Bool[Array, "pairs experts rows"],
    first_ER: Int32[Array, "experts rows"],
    size: int,
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
    (codes, _), _ = lax.scan(write_word, start, (words_PER, ends_PER))
    return codes


@functools.partial(jax.jit, static_argnames="count")
def _write_out(
    packed: PackedExperts,
    first: Int32[Array, ""],
    count: int,
    entries: UInt32[Array, " words"],
) -> UInt8[Array, "count rows columns"]:
    """One expert after another; a range that leaves the record ends with it."""
    start = jnp.clip(first, 0, packed.expert_bases.shape[0] - count)
    return lax.map(
        functools.partial(sub1_decode.expert_trits, packed, entries), start + jnp.arange(count)
    )
