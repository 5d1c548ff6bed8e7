# SPDX-License-Identifier: Apache-2.0
"""How the experts of one matrix become named arrays of a packed store, and back.

    qmoe      codes, the words of all experts without padding; row_lengths in words; row_values
    uniform   codes, scale, zero
    dense     kernel, [experts, in, out] as it is

Whatever would not come back bit for bit is refused.
"""

from collections.abc import Mapping
from typing import Literal, TypeAlias

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from pallas_kernels import packed as packed_lib
from pallas_kernels import validation
from pallas_kernels.packed import CHUNK_LEVELS, HostOrDevice, PackedExperts, UniformExperts
from qmoe_jax.codec import dictionary, uniform

Codec: TypeAlias = Literal["qmoe", "uniform", "dense"]
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
    if codec == "qmoe":
        return {
            "codes": (("uint16",), (None,)),
            "row_lengths": (("uint16", "uint32"), (E, R)),
            "row_values": (("bfloat16",), (E, R, 2)),
        }
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
        words = [packed_lib.expert_words(host, e) for e in range(host.shape[0])]
        lengths = np.diff(np.asarray(host.row_starts), axis=1)
        narrow = np.uint16 if lengths.max() < 2**16 else np.uint32
        return {
            "codes": np.concatenate(words),
            "row_lengths": lengths.astype(narrow),
            "row_values": np.asarray(host.row_values),
        }
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
    if codec == "qmoe":
        return _packed_experts(arrays, C)
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


def _packed_experts(arrays: Arrays, columns: int) -> PackedExperts:
    codes, lengths = arrays["codes"], arrays["row_lengths"]
    row_starts = np.zeros((lengths.shape[0], lengths.shape[1] + 1), np.int64)
    np.cumsum(lengths, axis=1, out=row_starts[:, 1:])
    ends = np.cumsum(row_starts[:, -1])
    if ends[-1] != codes.size:
        raise ValueError(f"its rows have {ends[-1]} words, its codes {codes.size}")
    words, starts = np.split(codes, ends[:-1]), row_starts.astype(np.uint32)
    record = packed_lib.assemble(words, starts, arrays["row_values"], columns, "qmoe")
    validation.validate(record, dictionary.nonzero_table())
    return record


def _exactly(name: str, array: np.ndarray, dtype: type) -> np.ndarray:
    wide = array.astype(np.float64)
    with np.errstate(invalid="ignore"):  # of values that do not fit, found below
        stored = array.astype(dtype)
    if not (np.isfinite(wide) & (stored.astype(np.float64) == wide)).all():
        raise ValueError(f"`{name}` holds values that are not finite and exact in {dtype.__name__}")
    return stored
