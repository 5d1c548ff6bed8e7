# SPDX-License-Identifier: Apache-2.0
"""Packed experts in memory: the records, their word formats and their index arithmetic.

Ternary experts are a string of 16-bit dictionary words. Rows are coded one by one, a row's words
are consecutive, so are an expert's rows, and every expert starts at a multiple of 64 words:

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
from jaxtyping import Array, BFloat16, Bool, Float, Int, UInt, UInt8, UInt16, UInt32

HostOrDevice: TypeAlias = Array | np.ndarray
Record = TypeVar("Record")

BLOCK_WORDS = 64  # unit of `expert_bases`
MAX_NONZEROS = 3  # of one word of the "qmoe" dictionary
CHUNK_LEVELS = 32  # columns of one group of bit planes of `UniformExperts`

# One uint32 per dictionary word: 5 bits of length in weights, then three 6-bit fields in column
# order, each a 5-bit position and a sign bit (1 = max value); the topmost 2 bits count the
# non-zeros, so that "more than f" is one comparison of the whole entry.
_FIELD_SHIFT = 5
_FIELD_BITS = 6
_COUNT_SHIFT = 30


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
    codec: str = _static()


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


def word_entries(
    trits: UInt8[np.ndarray, "words 28"], lengths: UInt8[np.ndarray, " words"]
) -> UInt32[np.ndarray, " words"]:
    """The run-time table of a dictionary: one uint32 per word, laid out as described above.

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


def expert_words(host: PackedExperts, expert: int) -> UInt16[np.ndarray, " n"]:
    """A view of one expert's words, without padding. The record must be on the host (`to_host`)."""
    codes = np.asarray(host.codes)
    experts_per_slab = host.expert_bases.shape[0] // codes.shape[0]
    first = int(host.expert_bases[expert]) * BLOCK_WORDS
    return codes[expert // experts_per_slab, first : first + int(host.row_starts[expert, -1])]


def assemble(
    words: Sequence[UInt16[np.ndarray, " _"]],
    row_starts: UInt32[np.ndarray, "experts starts"],
    row_values: BFloat16[np.ndarray, "experts rows 2"],
    columns: int,
    codec: str,
    slabs: int = 1,
    slab_words: int = 0,
) -> PackedExperts:
    """One host record from every expert's words; see `join` for `slabs` and `slab_words`."""
    bases, needed = expert_layout(row_starts[:, -1], slabs)
    width = -(-max(needed, slab_words) // BLOCK_WORDS) * BLOCK_WORDS
    experts, rows = row_values.shape[:2]
    shape = (experts, rows, columns)
    packed = PackedExperts(
        np.zeros((slabs, width), np.uint16), bases, row_starts, row_values, shape, codec
    )
    for expert, source in enumerate(words):
        expert_words(packed, expert)[:] = source
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
    words = [expert_words(g, e) for g in groups for e in range(g.shape[0])]
    row_starts = np.concatenate([group.row_starts for group in groups])
    row_values = np.concatenate([group.row_values for group in groups])
    return assemble(words, row_starts, row_values, columns, codec, slabs, slab_words)


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
    words = [expert_words(host, e) for e in range(first, first + count)]
    row_starts, row_values = np.asarray(host.row_starts)[part], np.asarray(host.row_values)[part]
    return assemble(words, row_starts, row_values, packed.shape[2], packed.codec)


def validate(packed: PackedExperts, entries: UInt32[np.ndarray, " words"]) -> None:
    """Checks on the host what every kernel relies on; a record that passes is read in bounds.

    Sizes agree with `shape`; experts lie in order inside their slab; every row has words, which
    expand to exactly its columns (padded to an even number, the padding zero); values are finite.

    Args:
      packed: the record; `codes` may be a memory map.
      entries: the dictionary's run-time table (`word_entries`).

    Raises:
      ValueError: naming the first expert (and row) at fault.
    """
    host = to_host(packed)
    _check_sizes(host)
    _check_bases(host)
    finite = np.isfinite(np.asarray(host.row_values, np.float32)).all(axis=2)
    if not finite.all():
        expert, row = np.argwhere(~finite)[0]
        raise ValueError(f"`row_values` of expert {expert}, row {row} are not finite")
    lengths = entry_length(entries).astype(np.uint8)
    for expert in range(host.shape[0]):
        _check_rows(host, expert, lengths, entries)


def check_kernel_operands(packed: PackedExperts, entries: UInt32[HostOrDevice, " words"]) -> None:
    """Checks what a traced program can know of a record and its table; see `validate` for the rest.

    Raises:
      ValueError: several slabs, a table of other than 65,536 words, or arrays of other sizes.
    """
    if packed.codes.shape[0] != 1:
        raise ValueError(
            f"`packed` has {packed.codes.shape[0]} slabs; expected one: call it inside `shard_map`"
            " on `local_view(packed)`, or join the groups into one slab"
        )
    if entries.shape != (1 << 16,) or entries.dtype != np.uint32:
        raise ValueError(f"`entries` must be uint32 [65536], got {entries.dtype} {entries.shape}")
    _check_sizes(packed)


def _check_sizes(host: PackedExperts) -> None:
    experts, rows, _ = host.shape
    if min(host.shape) < 1:
        raise ValueError(f"`shape` must be positive, got {host.shape}")
    expected = {
        "codes": ("uint16", host.codes.shape),
        "expert_bases": ("uint32", (experts,)),
        "row_starts": ("uint32", (experts, rows + 1)),
        "row_values": ("bfloat16", (experts, rows, 2)),
    }
    for name, kind in expected.items():
        array = getattr(host, name)
        if (got := (array.dtype.name, array.shape)) != kind:
            raise ValueError(f"`{name}` of {host.shape} experts must be {kind}, got {got}")
    slabs, words = host.codes.shape if host.codes.ndim == 2 else (0, 0)
    if slabs < 1 or experts % slabs or words % BLOCK_WORDS:
        raise ValueError(
            f"`codes` must be slabs that divide {experts} experts, of a multiple of {BLOCK_WORDS}"
            f" words; got {host.codes.shape}"
        )


def _check_bases(host: PackedExperts) -> None:
    slabs, slab_words = host.codes.shape
    first = np.asarray(host.expert_bases, np.int64).reshape(slabs, -1) * BLOCK_WORDS
    last = first + np.asarray(host.row_starts, np.int64)[:, -1].reshape(slabs, -1)
    limit = np.concatenate([first[:, 1:], np.full((slabs, 1), slab_words)], axis=1)
    if (wrong := np.flatnonzero(last > limit)).size:
        expert = wrong[0]
        raise ValueError(
            f"expert {expert} ends at word {last.flat[expert]} of its slab, past the next expert's"
            f" first word or the slab's end, {limit.flat[expert]}"
        )


def _check_rows(host: PackedExperts, expert: int, lengths, entries) -> None:
    words = expert_words(host, expert)
    starts = np.asarray(host.row_starts[expert], np.int64)
    if starts[0] or (np.diff(starts) < 1).any():
        row = 0 if starts[0] else int(np.argmax(np.diff(starts) < 1))
        raise ValueError(
            f"`row_starts` of expert {expert}, row {row}: must begin at 0 and rise by at least one"
            f" word a row, got {starts[row]} and {starts[row + 1]}"
        )
    columns = host.shape[2]
    weights = np.add.reduceat(np.take(lengths, words), starts[:-1], dtype=np.int64)
    if (wrong := np.flatnonzero(weights != columns + columns % 2)).size:
        row = wrong[0]
        raise ValueError(
            f"expert {expert}, row {row}: words expand to {weights[row]} weights, expected"
            f" {columns + columns % 2}"
        )
    if columns % 2:
        last = entries[words[starts[1:] - 1]]
        fields = [entry_nonzero(last, i)[0] + 1 == entry_length(last) for i in range(MAX_NONZEROS)]
        present = [entry_count(last) > i for i in range(MAX_NONZEROS)]
        if (wrong := np.flatnonzero((np.array(fields) & np.array(present)).any(axis=0))).size:
            raise ValueError(
                f"expert {expert}, row {wrong[0]}: the weight that pads an odd width is not zero"
            )
