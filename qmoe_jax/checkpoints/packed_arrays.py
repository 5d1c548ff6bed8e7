# SPDX-License-Identifier: Apache-2.0
"""How the experts of one matrix become named arrays of a packed store, and back.

    qmoe      codes, the words of all experts without padding; row_lengths in words; row_values
    tunstall  codes, of each expert its words and then its signs; row_lengths in words; row_values;
              trees, each expert's table of words; nonzeros, how many signs it has
    uniform   codes, scale, zero
    dense     kernel, [experts, in, out] as it is

Whatever would not come back bit for bit is refused.
"""

from collections.abc import Mapping
from typing import Literal, TypeAlias

import ml_dtypes
import numpy as np
from jaxtyping import Int, Integer, Shaped, UInt16, UInt32

from pallas_kernels import packed as packed_lib
from pallas_kernels import tunstall_words, validation
from pallas_kernels.packed import CHUNK_LEVELS, HostOrDevice, PackedExperts, UniformExperts
from qmoe_jax.codec import packing, uniform

Codec: TypeAlias = Literal["qmoe", "tunstall", "uniform", "dense"]
# One matrix of a group of experts: packed, bit-packed, or [experts, in, out] as it is.
Experts: TypeAlias = PackedExperts | UniformExperts | Shaped[HostOrDevice, "E C R"]
# Of each array the dtypes it may have, and its shape; None is a length that the data decide.
Layout: TypeAlias = dict[str, tuple[tuple[str, ...], tuple[int | None, ...]]]
Arrays: TypeAlias = Mapping[str, Shaped[np.ndarray, "..."]]

FLOATS = ("bfloat16", "float16", "float32")


def layout(codec: Codec, group_size: int, shape: tuple[int, int, int]) -> Layout:
    """The arrays of one matrix of a group.

    Args:
      codec: of the store.
      group_size: of the codec "uniform", see `UniformExperts`.
      shape: experts of the group, columns = in, rows = out.
    """
    E, C, R = shape
    if codec in packing.CODECS:
        arrays: Layout = {
            "codes": (("uint16",), (None,)),
            "row_lengths": (("uint16", "uint32"), (E, R)),
            "row_values": (("bfloat16",), (E, R, 2)),
        }
        signs: Layout = {"trees": (("uint8",), (E,)), "nonzeros": (("uint32",), (E,))}
        return arrays | signs if codec == "tunstall" else arrays
    if codec == "dense":
        return {"kernel": (FLOATS, (E, C, R))}
    groups = 1 if group_size == uniform.WHOLE_ROW else -(-C // group_size)
    return {
        "codes": (("uint32",), (E, R, -(-C // CHUNK_LEVELS), None)),
        "scale": (("bfloat16",), (E, R, groups)),
        "zero": (("uint8",), (E, R, groups)),
    }


def to_arrays(experts: Experts) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The arrays that are stored of `experts`.

    Raises:
      ValueError: a scale or a zero point that the store's dtype does not hold.
    """
    if isinstance(experts, PackedExperts):
        host = packed_lib.to_host(experts)
        units = [packed_lib.expert_codes(host, e) for e in range(host.shape[0])]
        lengths = np.diff(np.asarray(host.row_starts), axis=1)
        narrow = np.uint16 if lengths.max() < 2**16 else np.uint32
        arrays = {
            "codes": np.concatenate(units),
            "row_lengths": lengths.astype(narrow),
            "row_values": np.asarray(host.row_values),
        }
        if host.sign_starts is None:
            return arrays
        nonzeros = packed_lib.sign_counts(host).astype(np.uint32)
        return arrays | {"trees": np.asarray(host.trees), "nonzeros": nonzeros}
    if isinstance(experts, UniformExperts):
        return {
            "codes": np.asarray(experts.codes),
            "scale": _exactly("scale", np.asarray(experts.scale), ml_dtypes.bfloat16),
            "zero": _exactly("zero", np.asarray(experts.zero), np.uint8),
        }
    return {"kernel": np.asarray(experts)}


def from_arrays(
    arrays: Arrays, codec: Codec, group_size: int, shape: tuple[int, int, int]
) -> Experts:
    """The inverse of `to_arrays` for arrays that fit their `layout`, as NumPy arrays.

    Raises:
      ValueError: words, row lengths or row values that no kernel may be given.
    """
    E, C, R = shape
    if codec == "dense":
        return arrays["kernel"]
    if codec in packing.CODECS:
        return _packed_experts(arrays, codec, C)
    record = UniformExperts(
        codes=arrays["codes"],
        scale=arrays["scale"].astype(np.float32),
        zero=arrays["zero"].astype(np.float32),
        shape=(E, R, C),
        bits=arrays["codes"].shape[-1],
        group_size=group_size,
    )
    uniform.validate(record)
    return record


def expert_sizes(
    units: int,
    row_lengths: Integer[np.ndarray, "experts rows"],
    nonzeros: Integer[np.ndarray, " experts"] | None,
) -> Int[np.ndarray, " experts"]:
    """16-bit units of each ternary expert, as the arrays of a group tell them.

    Args:
      units: of `codes`.
      row_lengths: in words.
      nonzeros: of each expert; None where signs are not apart.

    Raises:
      ValueError: they are not so many as `codes` has.
    """
    sizes = row_lengths.sum(axis=1, dtype=np.int64)
    if nonzeros is not None:
        sizes += packed_lib.units_of_bits(nonzeros)
    if sizes.sum() != units:
        raise ValueError(f"its rows have {sizes.sum()} words, its codes {units}")
    return sizes


def _packed_experts(arrays: Arrays, codec: str, columns: int) -> PackedExperts:
    codes, lengths = arrays["codes"], arrays["row_lengths"]
    ends = np.cumsum(expert_sizes(codes.size, lengths, arrays.get("nonzeros")))
    units, table = np.split(codes, ends[:-1]), packing.entries(codec)
    row_starts = np.zeros((lengths.shape[0], lengths.shape[1] + 1), np.int64)
    np.cumsum(lengths, axis=1, out=row_starts[:, 1:])
    trees = arrays.get("trees")
    record = packed_lib.assemble(
        units,
        row_starts.astype(np.uint32),
        arrays["row_values"],
        columns,
        codec,
        trees=trees,
        sign_starts=None if trees is None else _sign_starts(arrays, units, row_starts, table),
    )
    validation.validate(record, table)
    return record


def _sign_starts(
    arrays: Arrays,
    units: list[UInt16[np.ndarray, " _"]],
    row_starts: Int[np.ndarray, "experts starts"],
    table: UInt32[np.ndarray, " entries"],
) -> UInt32[np.ndarray, "experts starts"]:
    """Where the signs of each row begin, by the words of all rows before it."""
    trees = arrays["trees"]
    if (trees >= tunstall_words.TREES).any():
        raise ValueError(f"`trees` must be below {tunstall_words.TREES}, got {trees.max()}")
    tables = table.reshape(tunstall_words.TREES, -1)
    nonzeros_ER = np.stack(
        [
            tunstall_words.row_nonzeros(own[: starts[-1]], starts, tables[tree])
            for own, starts, tree in zip(units, row_starts, trees, strict=True)
        ]
    )
    if (nonzeros_ER.sum(axis=1) != arrays["nonzeros"]).any():
        raise ValueError("`nonzeros` are not those of its words")
    return tunstall_words.sign_starts(nonzeros_ER, row_starts[:, -1])


def _exactly(name: str, array: np.ndarray, dtype: type) -> np.ndarray:
    wide = array.astype(np.float64)
    with np.errstate(invalid="ignore"):  # of values that do not fit, found below
        stored = array.astype(dtype)
    if not (np.isfinite(wide) & (stored.astype(np.float64) == wide)).all():
        raise ValueError(f"`{name}` holds values that are not finite and exact in {dtype.__name__}")
    return stored
