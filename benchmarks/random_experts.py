# SPDX-License-Identifier: Apache-2.0
"""Ternary experts of independent trits, for benchmarks that need no trained ones."""

import ml_dtypes
import numpy as np
from jaxtyping import UInt8

from pallas_kernels import packed as packed_lib
from pallas_kernels.packed import PackedExperts
from qmoe_jax.codec import packing

DISTINCT = 4  # random experts; the others hold the same words in places of their own


def trits(shape: tuple[int, ...], zeros: float) -> UInt8[np.ndarray, "..."]:
    """Zeros of this share, and as many of either sign."""
    drawn = np.random.default_rng(0).random(shape, np.float32)
    return (drawn >= zeros).astype(np.uint8) + (drawn >= (1 + zeros) / 2)


def experts(
    shape: tuple[int, int, int], zeros: float, codec: packing.Codec, distinct: int = DISTINCT
) -> PackedExperts:
    """Packed experts on the host, whose products are of order one; few of them are distinct.

    Args:
      shape: experts, rows, columns.
      zeros: share of them.
      codec: of the words.
      distinct: how many are; the others repeat them.
    """
    count, rows, columns = shape
    distinct = min(count, distinct)
    spread = np.random.default_rng(1).standard_normal((distinct, rows, 2))
    values = (np.abs(spread) * [-1, 1] / columns**0.5).astype(ml_dtypes.bfloat16)
    few = packing.pack_ternary(
        trits((distinct, rows, columns), zeros), values.astype(np.float32), codec
    )
    ones = [packed_lib.expert_slice(few, expert, 1) for expert in range(distinct)]
    return packed_lib.join([ones[expert % distinct] for expert in range(count)])
