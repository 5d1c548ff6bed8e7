# SPDX-License-Identifier: Apache-2.0
"""What tests and benchmarks of the kernels share: the table of shapes, random packs, a reference.

Random packs need no encoder: rows are filled with words as often as a greedy parse of independent
trits would emit them, so that bits a weight and the traffic to the table are those of real packs.
"""

import dataclasses
import functools

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt32

from pallas_kernels import packed as packed_lib
from pallas_kernels.packed import PackedExperts


@dataclasses.dataclass(frozen=True)
class Case:
    """Experts of one size and how many tokens each of them gets."""

    name: str
    rows: int
    columns: int
    group_sizes: tuple[int, ...]
    rest: int = 0  # tokens of no expert
    zeros: float = 0.885

    @property
    def experts(self) -> int:
        return len(self.group_sizes)

    @property
    def tokens(self) -> int:
        return sum(self.group_sizes) + self.rest


# wi and wo of the models that the paper compresses, and of switch-xxl-128.
PUBLISHED = (
    Case("base wi", 3072, 768, (1, 0)),
    Case("base wo", 768, 3072, (0, 1)),
    Case("large wi", 4096, 1024, (1,)),
    Case("large wo", 1024, 4096, (1,)),
    Case("c wi", 6144, 2080, (1,)),
    Case("c wo", 2080, 6144, (1,)),
    Case("xxl wi", 10240, 4096, (1,)),
    Case("xxl wo", 4096, 10240, (1,)),
)

SMALL = (
    Case("one weight", 1, 1, (1,)),
    Case("one row", 1, 500, (3,)),
    Case("one column", 70, 1, (2, 1)),
    Case("odd width", 33, 129, (2, 0, 5), rest=2),
    Case("odd everything", 37, 61, (1, 1, 1, 1, 1)),
    Case("no tokens", 8, 64, (0, 0, 0)),
    Case("all dropped", 8, 64, (0, 0, 0), rest=5),
    Case("one busy expert", 40, 96, (0, 0, 41, 0)),
    Case("many experts, few tokens", 9, 64, (0,) * 50 + (1,) + (0,) * 40 + (2,) + (0,) * 8),
    Case("uneven", 64, 256, (17, 0, 1, 8, 0, 3), rest=3),
    Case("dense rows", 24, 300, (4, 4), zeros=0.3),
    Case("empty rows", 24, 300, (4, 4), zeros=1.0),
)


def random_packed(
    entries: UInt32[np.ndarray, " words"], case: Case, seed: int = 0
) -> PackedExperts:
    """A valid record on the host with the case's experts; row values are about normal."""
    generator = np.random.default_rng(seed)
    width = case.columns + case.columns % 2
    lengths = packed_lib.entry_length(entries).astype(np.int64)
    cumulative = np.cumsum(_emissions(entries, case.zeros))
    zero_words = {int(lengths[w]): w for w in np.flatnonzero(packed_lib.entry_count(entries) == 0)}
    tail = np.array([zero_words.get(i, 0) for i in range(32)], np.uint16)
    mean = float(np.diff(cumulative, prepend=0) @ lengths)
    per_row = int(width / mean * 1.3) + 16  # or the rest of the row is zeros
    words, counts = [], np.zeros((case.experts, case.rows), np.int64)
    for expert in range(case.experts):
        drawn = np.searchsorted(cumulative, generator.random((case.rows, per_row)), side="right")
        drawn = np.minimum(drawn, len(entries) - 1)
        ends = np.cumsum(lengths[drawn], axis=1)
        fits = ends < width
        place = np.take_along_axis(ends, fits.sum(1, keepdims=True) - 1, 1)[:, 0]
        left = np.where(fits.any(1), width - place, width)
        rows = [row[:n] for row, n in zip(drawn.astype(np.uint16), fits.sum(1), strict=True)]
        tails = [[28] * (n // 28) + [n % 28] * bool(n % 28) for n in left.tolist()]
        rows = [np.append(row, tail[rest]) for row, rest in zip(rows, tails, strict=True)]
        counts[expert] = [len(row) for row in rows]
        words.append(np.concatenate(rows).astype(np.uint16))
    starts = np.pad(np.cumsum(counts, axis=1), ((0, 0), (1, 0))).astype(np.uint32)
    values = np.abs(generator.standard_normal((case.experts, case.rows, 2))) * [-1, 1]
    packed = packed_lib.assemble(
        words, starts, values.astype(ml_dtypes.bfloat16), case.columns, "qmoe"
    )
    packed_lib.validate(packed, entries)
    return packed


def dense(
    packed: PackedExperts, entries: UInt32[np.ndarray, " words"]
) -> Float[np.ndarray, "experts rows columns"]:
    """All experts in float64, word after word."""
    experts, rows, columns = packed.shape
    weights = np.zeros((experts, rows, columns + columns % 2))
    for expert in range(experts):
        entry = entries[packed_lib.expert_words(packed, expert)]
        length = packed_lib.entry_length(entry).astype(np.int64)
        begin = np.cumsum(length) - length
        values = np.asarray(packed.row_values[expert], np.float64)
        for field in range(packed_lib.MAX_NONZEROS):
            position, sign = packed_lib.entry_nonzero(entry, field)
            there = packed_lib.entry_has(entry, field)
            row, column = divmod((begin + position)[there], weights.shape[2])
            weights[expert, row, column] = values[row, sign[there]]
    return weights[:, :, :columns]


@functools.cache
def _parents(entries: bytes) -> np.ndarray:
    """The word that each one without its last pair is; -1 for a single pair."""
    table = np.frombuffer(entries, np.uint32)
    words = np.arange(len(table))
    length = packed_lib.entry_length(table).astype(np.int64)
    trits = np.zeros((len(table), 28), np.uint8)
    for field in range(packed_lib.MAX_NONZEROS):
        position, sign = packed_lib.entry_nonzero(table, field)
        there = packed_lib.entry_has(table, field)
        trits[words[there], position[there]] = sign[there] + 1
    shorter = np.maximum(length - 2, 0)
    trits[words, shorter] = trits[words, shorter + 1] = 0
    wanted = packed_lib.word_entries(trits, shorter.astype(np.uint8))
    order = np.argsort(table)
    found = order[np.minimum(np.searchsorted(table[order], wanted), len(table) - 1)]
    return np.where((table[found] == wanted) & (shorter > 0), found, -1)


def _emissions(entries: np.ndarray, zeros: float) -> np.ndarray:
    """How often a greedy parse emits each word, such that `zeros` of all weights are 0.

    A word ends where the parse enters it but none of its longer ones. What follows such an end is
    no longer independent of it, which this leaves out: hence the search for the source.
    """
    nonzeros = np.asarray(packed_lib.entry_count(entries), np.int64)
    length = np.asarray(packed_lib.entry_length(entries), np.int64)
    parents = _parents(entries.tobytes())

    def emissions(source: float) -> np.ndarray:
        entered = source ** (length - nonzeros) * ((1 - source) / 2) ** nonzeros
        left = entered.copy()
        np.subtract.at(left, parents[parents >= 0], entered[parents >= 0])
        return np.maximum(left, 0) / np.maximum(left, 0).sum()

    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        found = emissions(middle)
        more = 1 - found @ nonzeros / (found @ length) < zeros
        low, high = (middle, high) if more else (low, middle)
    return emissions(high)
