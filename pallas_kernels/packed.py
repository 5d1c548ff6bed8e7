# SPDX-License-Identifier: Apache-2.0
"""Packed experts in memory: the records and their index arithmetic.

Ternary experts are a string of 16-bit words of one of two codecs (`dictionary_words`,
`tunstall_words`). Rows are coded one by one, a row's words are consecutive, so are an expert's
rows, and every expert starts at a multiple of 64 words:

    first word of row r of expert e = 64 * expert_bases[e] + row_starts[e, r]   (inside its slab)

Which index arithmetic is safe: a matrix of all experts may hold billions of words, so the sum above
does not fit 32 bits and is NEVER formed on a device. Read a slab as ``[words / 64, 64]``: the word
at ``offset`` of an expert stands in block ``expert_bases[e] + (offset >> 6)``, which fits uint32 up
to 2**38 words a slab, and lane ``offset & 63``. Device code with 64-bit pointers widens the base
before it multiplies. On the host all sums are Python or int64 integers. An offset inside one expert
fits uint32.

Ternary levels ("trits"): 0 = zero, 1 = the row's min value, 2 = its max value.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TypeAlias, TypeVar

import jax
import numpy as np
from jaxtyping import Array, BFloat16, Float, Int, Integer, UInt, UInt8, UInt16, UInt32

HostOrDevice: TypeAlias = Array | np.ndarray
Record = TypeVar("Record")

BLOCK_WORDS = 64  # unit of `expert_bases`
_BY_EXPERT = ("row_starts", "row_values", "trees", "sign_starts")  # arrays with a row for each
CHUNK_LEVELS = 32  # columns of one group of bit planes of `UniformExperts`


def _register(cls: type[Record]) -> type[Record]:
    """Registers a frozen dataclass as a pytree; fields marked `static` are its structure.

    Unlike `jax.tree_util.register_dataclass`, unflattening skips `__init__`: run-time shape checks
    would reject the ShapeDtypeStructs, shardings and placeholders that JAX puts into leaves.
    """
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    data = [f.name for f in fields if not f.metadata.get("static")]
    meta = [f.name for f in fields if f.metadata.get("static")]

    def flatten(record):
        return [getattr(record, n) for n in data], tuple(getattr(record, n) for n in meta)

    def flatten_with_keys(record):
        leaves, structure = flatten(record)
        return list(zip(map(jax.tree_util.GetAttrKey, data), leaves, strict=True)), structure

    def unflatten(structure, leaves):
        record = object.__new__(cls)
        for name, value in zip((*data, *meta), (*leaves, *structure), strict=True):
            object.__setattr__(record, name, value)
        return record

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def _static():
    return dataclasses.field(metadata={"static": True})


@_register
@dataclasses.dataclass(frozen=True, eq=False)
class PackedExperts:
    """All experts (or some consecutive ones) of one ternary matrix.

    Slab s holds experts ``[s * E / S, (s + 1) * E / S)``; all slabs are padded to the same multiple
    of 64 words, so that `codes` and the other arrays shard along their first axis. Padding is never
    read. `shape` is static and therefore global: inside `shard_map` take the number of experts from
    the arrays (`local_view`).
    """

    codes: UInt16[HostOrDevice, "slabs words"]
    expert_bases: UInt32[HostOrDevice, " experts"]  # first word inside the slab, in blocks of 64
    row_starts: UInt32[HostOrDevice, "experts starts"]  # words from the base; last: word count
    row_values: BFloat16[HostOrDevice, "experts rows 2"]  # min, max
    shape: tuple[int, int, int] = _static()  # experts, rows = out, columns = in
    codec: str = _static()  # "qmoe" or "tunstall"
    # Of "tunstall" alone: each expert's table of words, and the first bit of each row's signs.
    trees: UInt8[HostOrDevice, " experts"] | None = None
    sign_starts: UInt32[HostOrDevice, "experts starts"] | None = None


@_register
@dataclasses.dataclass(frozen=True, eq=False)
class UniformExperts:
    """Experts of 2 to 4 bits a weight: ``scale * (level - zero)``.

    Levels are stored as bit planes: bit j of the word ``codes[e, r, c // 32, b]`` is bit b of the
    level of column ``c = 32 * (c // 32) + j``. So 3 bits take 3 bits, no level straddles two words,
    one layout serves all widths, and 32 lanes decode a chunk from `bits` words that they share.
    A row is padded with zero levels to a multiple of 32 columns.
    """

    codes: UInt32[HostOrDevice, "experts rows chunks bits"]
    scale: Float[HostOrDevice, "experts rows groups"]
    zero: Float[HostOrDevice, "experts rows groups"]
    shape: tuple[int, int, int] = _static()  # experts, rows = out, columns = in
    bits: int = _static()
    group_size: int = _static()  # columns that share a scale; -1: the whole row


Counted = TypeVar("Counted", bound=PackedExperts | UniformExperts)


def local_view(packed: Counted) -> Counted:
    """The same arrays under the number of experts they really hold, for use inside `shard_map`."""
    array = packed.expert_bases if isinstance(packed, PackedExperts) else packed.codes
    return dataclasses.replace(packed, shape=(array.shape[0], *packed.shape[1:]))


def to_host(packed: PackedExperts) -> PackedExperts:
    """The same record with NumPy arrays; copies nothing that is on the host already."""
    return jax.tree.map(np.asarray, packed)


def expert_layout(
    word_counts: Int[np.ndarray, " experts"] | UInt[np.ndarray, " experts"], slabs: int = 1
) -> tuple[UInt32[np.ndarray, " experts"], int]:
    """Places experts of these word counts one after another into equal slabs.

    Returns:
      `expert_bases`, and the words of a slab (a multiple of 64).

    Raises:
      ValueError: the experts do not divide by the slabs, or a slab exceeds 2**38 words.
    """
    experts = len(word_counts)
    if slabs < 1 or experts % slabs:
        raise ValueError(f"{experts} experts do not divide into {slabs} equal slabs")
    blocks = -(-word_counts.astype(np.int64) // BLOCK_WORDS)
    ends = np.cumsum(blocks.reshape(slabs, -1), axis=1)
    if (longest := int(ends[:, -1].max())) > 2**32:
        raise ValueError(f"a slab of {longest} x 64 words exceeds 2**38 words: use more slabs")
    return (ends.reshape(-1) - blocks).astype(np.uint32), longest * BLOCK_WORDS


def expert_sizes(host: PackedExperts) -> Int[np.ndarray, " experts"]:
    """16-bit units of each expert: its words, and with "tunstall" its signs."""
    if host.sign_starts is None:
        return np.asarray(host.row_starts, np.int64)[:, -1]
    return units_of_bits(np.asarray(host.sign_starts)[:, -1])


def sign_counts(host: PackedExperts) -> Int[np.ndarray, " experts"]:
    """Non-zeros of each expert, whose signs are apart (codec "tunstall")."""
    words = np.asarray(host.row_starts, np.int64)[:, -1]
    return np.asarray(host.sign_starts, np.int64)[:, -1] - 16 * words


def units_of_bits(bits: Integer[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """16-bit units that hold so many bits."""
    return -(-bits.astype(np.int64) // 16)


def expert_codes(host: PackedExperts, expert: int) -> UInt16[np.ndarray, " n"]:
    """A view of one expert's units, without padding. The record must be on the host (`to_host`)."""
    codes = np.asarray(host.codes)
    experts_per_slab = host.expert_bases.shape[0] // codes.shape[0]
    first = int(host.expert_bases[expert]) * BLOCK_WORDS
    return codes[expert // experts_per_slab, first : first + int(expert_sizes(host)[expert])]


def expert_words(host: PackedExperts, expert: int) -> UInt16[np.ndarray, " n"]:
    """A view of one expert's words alone."""
    return expert_codes(host, expert)[: int(host.row_starts[expert, -1])]


def assemble(
    codes: Sequence[UInt16[np.ndarray, " _"]],
    row_starts: UInt32[np.ndarray, "experts starts"],
    row_values: BFloat16[np.ndarray, "experts rows 2"],
    columns: int,
    codec: str,
    *,
    trees: UInt8[np.ndarray, " experts"] | None = None,
    sign_starts: UInt32[np.ndarray, "experts starts"] | None = None,
    slabs: int = 1,
    slab_words: int = 0,
) -> PackedExperts:
    """One host record from every expert's units; see `join` for `slabs` and `slab_words`."""
    bases, needed = expert_layout(np.array([len(units) for units in codes]), slabs)
    width = -(-max(needed, slab_words, 1) // BLOCK_WORDS) * BLOCK_WORDS
    experts, rows = row_values.shape[:2]
    packed = PackedExperts(
        codes=np.zeros((slabs, width), np.uint16),
        expert_bases=bases,
        row_starts=row_starts,
        row_values=row_values,
        shape=(experts, rows, columns),
        codec=codec,
        trees=trees,
        sign_starts=sign_starts,
    )
    for expert, units in enumerate(codes):
        expert_codes(packed, expert)[:] = units
    return packed


def join(groups: Iterable[PackedExperts], slabs: int = 1, slab_words: int = 0) -> PackedExperts:
    """One host record of all experts from records of consecutive ones; copies every word once.

    Args:
      groups: in expert order; equal rows, columns and codec.
      slabs: number of devices that will share the record.
      slab_words: pad slabs at least to this many words, so that matrices of one shape but of
        different word counts share a compiled program.

    Raises:
      ValueError: no group, groups that differ in shape or codec, or an uneven division.
    """
    groups = [to_host(group) for group in groups]
    kinds = {(*group.shape[1:], group.codec) for group in groups}
    if len(kinds) != 1:
        raise ValueError(f"`groups` must agree in (rows, columns, codec); got {sorted(kinds)}")
    ((_, columns, codec),) = kinds
    codes = [expert_codes(g, e) for g in groups for e in range(g.shape[0])]
    arrays = {name: [getattr(group, name) for group in groups] for name in _BY_EXPERT}
    joined = {name: np.concatenate(of) for name, of in arrays.items() if of[0] is not None}
    return assemble(
        codes, columns=columns, codec=codec, slabs=slabs, slab_words=slab_words, **joined
    )


def join_uniform(groups: Sequence[UniformExperts]) -> UniformExperts:
    """One host record of all experts from records of consecutive ones.

    Raises:
      ValueError: no group, or groups that differ in shape, bits or group size.
    """
    kinds = {(*group.shape[1:], group.bits, group.group_size) for group in groups}
    if len(kinds) != 1:
        raise ValueError(
            f"`groups` must agree in (rows, columns, bits, group size); got {sorted(kinds)}"
        )
    codes, scale, zero = (
        np.concatenate([np.asarray(getattr(group, name)) for group in groups])
        for name in ("codes", "scale", "zero")
    )
    shape = (codes.shape[0], *groups[0].shape[1:])
    return UniformExperts(codes, scale, zero, shape, groups[0].bits, groups[0].group_size)


def expert_slice(packed: PackedExperts, first: int, count: int) -> PackedExperts:
    """A host record of one slab with experts ``[first, first + count)``.

    Raises:
      ValueError: the range is empty or leaves the record.
    """
    if not 0 <= first < first + count <= packed.shape[0]:
        raise ValueError(
            f"experts [{first}, {first + count}) are not a part of {packed.shape[0]} experts"
        )
    host, part = to_host(packed), slice(first, first + count)
    codes = [expert_codes(host, e) for e in range(first, first + count)]
    arrays = {name: getattr(host, name) for name in _BY_EXPERT}
    own = {name: of[part] for name, of in arrays.items() if of is not None}
    return assemble(codes, columns=packed.shape[2], codec=packed.codec, **own)
