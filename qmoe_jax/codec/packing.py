# SPDX-License-Identifier: Apache-2.0
"""Trits to `PackedExperts` and back, by either codec.

    qmoe       the words of QMoE's fixed dictionary (arXiv 2310.16795, section 4); the default
    tunstall   words of one of a few trees, signs apart: near entropy

`pallas_kernels.sub1_decode` reads both again.
"""

import dataclasses
import functools
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int, Int32, UInt8, UInt16, UInt32

from pallas_kernels import packed as packed_lib
from pallas_kernels import sub1_decode, tunstall_words, validation
from pallas_kernels.packed import HostOrDevice, PackedExperts
from pallas_kernels.validation import words_of
from qmoe_jax.codec import dictionary, dictionary_parse, tunstall, tunstall_parse

Codec: TypeAlias = Literal["qmoe", "tunstall"]
CODECS: tuple[Codec, ...] = get_args(Codec)


@dataclasses.dataclass(frozen=True, eq=False)
class PublishedMatrix:
    """One matrix as the authors' checkpoints hold it (there `w_comp` is stored as int16)."""

    w_comp: UInt16[np.ndarray, " words"]
    row_off: Int32[np.ndarray, " rows_and_end"]
    ter_minmax: BFloat16[np.ndarray, " values"]  # min and max of row 0, of row 1, ...


def entries(codec: str) -> UInt32[np.ndarray, " entries"]:
    """The run-time table of a codec's words, which decoders and kernels take; built once.

    Raises:
      ValueError: there is no such codec of ternary experts.
    """
    words_of(codec)
    return dictionary.nonzero_table() if codec == "qmoe" else tunstall.entries()


def pack_ternary(
    trits: UInt8[HostOrDevice, "experts rows columns"],
    row_values: Float[HostOrDevice, "experts rows 2"],
    codec: str = "qmoe",
) -> PackedExperts:
    """Packs a group of experts; about 4 bytes of working memory a weight.

    A trit whose row value is 0 is stored as trit 0: it decodes to the same weight, and a row whose
    min (or max) is 0 would otherwise spend up to 8 bits on each of its zeros.

    Args:
      trits: 0 = zero, 1 = the row's min, 2 = its max.
      row_values: min and max of each row, finite and exact in bfloat16.
      codec: of the words.

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
    coded, highest = _without_zero_values(trits, values)
    if int(highest) > 2:
        raise ValueError(f"`trits` must be 0, 1 or 2, got {int(highest)}")
    shape = (experts, rows, columns)
    if codec == "qmoe":
        return _pack_by_dictionary(coded, values, shape)
    return _pack_by_trees(coded, values, shape)


def unpack_ternary(
    packed: PackedExperts, first: int | Int[Array, ""] = 0, count: int | None = None
) -> UInt8[Array, "count rows columns"]:
    """The trits of experts ``[first, first + count)``; by default of all.

    Jitted, and traceable inside other programs; `first` may be a traced index. Reads stay inside
    `codes` whatever they hold, but only a valid record (`pallas_kernels.packed.validate`) gives
    meaningful trits.

    Raises:
      ValueError: a record of an unknown codec, or a static range that leaves the record.
    """
    words_of(packed.codec)
    experts = packed.expert_bases.shape[0]
    size = experts if count is None else count
    if isinstance(first, int) and not 0 <= first < first + size <= experts:
        raise ValueError(f"experts [{first}, {first + size}) are not a part of {experts} experts")
    index = jnp.asarray(first, jnp.int32)
    return _write_out(packed, index, size, jnp.asarray(entries(packed.codec)))


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
    packed = packed_lib.assemble([matrix.w_comp], row_starts, row_values, columns, "qmoe")
    validation.validate(packed, entries("qmoe"))
    return packed


def _pack_by_dictionary(coded, values, shape: tuple[int, int, int]) -> PackedExperts:
    parsed = dictionary_parse.parse(coded)
    row_starts = _row_starts(parsed.row_words)
    bases, size = packed_lib.expert_layout(row_starts[:, -1])
    first = bases[:, None].astype(np.int64) * packed_lib.BLOCK_WORDS + row_starts[:, :-1]
    codes = dictionary_parse.write(parsed, first.astype(np.int32), _bucket(size))
    on_device = map(jnp.asarray, (codes[None], bases, row_starts, values))
    return PackedExperts(*on_device, shape=shape, codec="qmoe")


def _pack_by_trees(coded, values, shape: tuple[int, int, int]) -> PackedExperts:
    parsed = tunstall_parse.parse(coded)
    row_starts = _row_starts(parsed.row_words)
    signs = tunstall_words.sign_starts(np.asarray(parsed.nonzeros), row_starts[:, -1])
    bases, size = packed_lib.expert_layout(packed_lib.units_of_bits(signs[:, -1]))
    base = bases[:, None].astype(np.int64) * packed_lib.BLOCK_WORDS
    unit, bit = np.divmod(signs[:, :-1].astype(np.int32), tunstall_words.UNIT_BITS)
    places = (base + row_starts[:, :-1], base + unit, bit)
    codes = tunstall_parse.write(parsed, *(of.astype(np.int32) for of in places), _bucket(size))
    on_device = map(jnp.asarray, (codes[None], bases, row_starts, values))
    more = {"trees": jnp.asarray(parsed.trees), "sign_starts": jnp.asarray(signs)}
    return PackedExperts(*on_device, shape=shape, codec="tunstall", **more)


def _row_starts(row_words: Int32[Array, "experts rows"]) -> UInt32[np.ndarray, "experts starts"]:
    ends = np.cumsum(np.asarray(row_words), axis=1, dtype=np.uint32)
    return np.pad(ends, ((0, 0), (1, 0)))


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


@jax.jit
def _without_zero_values(
    trits_ERC: UInt8[Array, "experts rows columns"], values_ER2: BFloat16[Array, "experts rows 2"]
) -> tuple[UInt8[Array, "experts rows columns"], UInt8[Array, ""]]:
    """Trits, those whose value is 0 made trit 0; and the highest given."""
    no_ER2 = values_ER2 == 0
    is_zero_ERC = ((trits_ERC == 1) & no_ER2[..., :1]) | ((trits_ERC == 2) & no_ER2[..., 1:])
    return jnp.where(is_zero_ERC, jnp.uint8(0), trits_ERC), trits_ERC.max()


def _bucket(words: int) -> int:
    """Rounds up to one of 4 sizes an octave (at most 25% more), a multiple of 64."""
    words = max(words, 1)
    step = max(packed_lib.BLOCK_WORDS, 2 ** max(words.bit_length() - 3, 0))
    return -(-words // step) * step


@functools.partial(jax.jit, static_argnames="count")
def _write_out(
    packed: PackedExperts,
    first: Int32[Array, ""],
    count: int,
    table: UInt32[Array, " entries"],
) -> UInt8[Array, "count rows columns"]:
    """One expert after another; a range that leaves the record ends with it."""
    start = jnp.clip(first, 0, packed.expert_bases.shape[0] - count)
    return lax.map(
        functools.partial(sub1_decode.expert_trits, packed, table), start + jnp.arange(count)
    )
