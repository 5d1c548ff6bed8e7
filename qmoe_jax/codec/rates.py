# SPDX-License-Identifier: Apache-2.0
"""What packed experts take, in bits per expert weight, and the entropy they are measured against.

Everything stored is counted. The words' tables are implied by the codec's name and take no stored
bit; whole-model rates, with manifests and what stays uncompressed, are file bytes
over parameters and are not taken here.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pallas_kernels import dictionary_words
from pallas_kernels import packed as packed_lib
from pallas_kernels.packed import PackedExperts, UniformExperts
from qmoe_jax.codec import dictionary


@dataclasses.dataclass(frozen=True)
class StoredBits:
    """Bits on disk of one matrix of all its experts; padding of the layout in memory left out."""

    weights: int
    codes: int  # words, and signs that are apart from them
    row_lengths: int  # word count of each row: 16 bits where all of the matrix fit, else 32
    row_values: int  # min and max, or scale and zero

    @property
    def payload(self) -> float:
        """Bits per weight of the codes alone."""
        return self.codes / self.weights

    @property
    def total(self) -> float:
        """Bits per weight of everything stored."""
        return (self.codes + self.row_lengths + self.row_values) / self.weights


def bits_per_weight(packed: PackedExperts | UniformExperts) -> StoredBits:
    """Counts the stored bits of a record; reads row starts but no codes."""
    weights = int(np.prod(packed.shape, dtype=np.int64))
    if isinstance(packed, UniformExperts):
        values = (16 + 8) * packed.scale.size  # stored as bfloat16 and uint8
        return StoredBits(weights, 8 * packed.codes.nbytes, 0, values)
    units = int(packed_lib.expert_sizes(packed).sum())
    row_lengths = np.diff(np.asarray(packed.row_starts), axis=1)
    lengths = (16 if row_lengths.max() < 2**16 else 32) * row_lengths.size
    if packed.trees is not None:
        lengths += (8 + 32) * packed.shape[0]  # of each expert its table and its non-zeros
    return StoredBits(weights, 16 * units, lengths, 8 * packed.row_values.nbytes)


def zero_fraction(packed: PackedExperts) -> float:
    """Share of weights stored as trit 0; reads every word, on the host.

    Packing stores a trit whose row value is 0 as trit 0, so this is the share of zero weights.
    """
    host = packed_lib.to_host(packed)
    weights = int(np.prod(packed.shape, dtype=np.int64))
    if packed.sign_starts is not None:
        return 1 - int(packed_lib.sign_counts(host).sum()) / weights
    nonzeros = dictionary_words.entry_count(dictionary.nonzero_table()).astype(np.uint8)
    experts = range(packed.shape[0])
    found = (nonzeros[packed_lib.expert_words(host, e)].sum(dtype=np.int64) for e in experts)
    return 1 - int(sum(found)) / weights


def entropy(counts: Sequence[float | int] | np.ndarray) -> float:
    """Bits per symbol of a source with these counts (or probabilities): no code can take fewer.

    Raises:
      ValueError: a negative count, or none above zero.
    """
    counts = np.asarray(counts, np.float64)
    if counts.min(initial=0) < 0 or not counts.sum() > 0:
        raise ValueError(f"`counts` must be non-negative and not all zero, got {counts}")
    shares = counts[counts > 0] / counts.sum()
    return float(np.sum(shares * np.log2(1 / shares)))
