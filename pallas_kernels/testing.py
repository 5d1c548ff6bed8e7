# SPDX-License-Identifier: Apache-2.0
"""What tests and benchmarks of the kernels share: the table of shapes, random packs, a reference.

Random packs need no encoder: rows are filled with words as often as a greedy parse of independent
trits would emit them, so that bits a weight and the traffic to the table are those of real packs.
"""

import dataclasses
import functools
from collections.abc import Callable

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt32

from pallas_kernels import dictionary_words, tunstall_words, validation
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
    entries: UInt32[np.ndarray, " entries"], case: Case, seed: int = 0, codec: str = "qmoe"
) -> PackedExperts:
    """A valid record on the host with the case's experts; row values are about normal.

    Args:
      entries: the run-time table of the codec.
      case: what is asked for.
      seed: of everything random.
      codec: of the words; experts of "tunstall" take the trees in turn.
    """
    generator = np.random.default_rng(seed)
    values = np.abs(generator.standard_normal((case.experts, case.rows, 2))) * [-1, 1]
    row_values = values.astype(ml_dtypes.bfloat16)
    if codec == "tunstall":
        packed = _random_tunstall(entries, case, generator, row_values)
    else:
        fill = _dictionary_filler(entries, case)
        rows = [fill(generator) for _ in range(case.experts)]
        codes = [np.concatenate(expert) for expert in rows]
        packed = packed_lib.assemble(codes, _starts(rows), row_values, case.columns, codec)
    validation.validate(packed, entries)
    return packed


def dense(
    packed: PackedExperts, entries: UInt32[np.ndarray, " entries"]
) -> Float[np.ndarray, "experts rows columns"]:
    """All experts in float64, word after word."""
    if packed.codec == "tunstall":
        return _dense_tunstall(packed, entries)
    experts, rows, columns = packed.shape
    weights = np.zeros((experts, rows, columns + columns % 2))
    for expert in range(experts):
        entry = entries[packed_lib.expert_words(packed, expert)]
        length = dictionary_words.entry_length(entry).astype(np.int64)
        begin = np.cumsum(length) - length
        values = np.asarray(packed.row_values[expert], np.float64)
        for field in range(dictionary_words.MAX_NONZEROS):
            position, sign = dictionary_words.entry_nonzero(entry, field)
            there = dictionary_words.entry_has(entry, field)
            row, column = divmod((begin + position)[there], weights.shape[2])
            weights[expert, row, column] = values[row, sign[there]]
    return weights[:, :, :columns]


def with_a_damaged_row(
    packed: PackedExperts, entries: UInt32[np.ndarray, " entries"], expert: int, row: int
) -> PackedExperts:
    """A host copy in which the words of one row expand to far more weights than it has columns."""
    codes = np.array(packed.codes)
    base = packed_lib.BLOCK_WORDS * int(packed.expert_bases[expert])
    words = slice(*(base + packed.row_starts[expert, row : row + 2].astype(np.int64)))
    format_ = validation.words_of(packed.codec)
    table = entries if packed.trees is None else entries.reshape(-1, 1 << 16)[packed.trees[expert]]
    length = np.asarray(format_.entry_length(table), np.int64)
    codes[0, words] = np.argmax(np.where(format_.entry_count(table) > 0, length, 0))
    return dataclasses.replace(packed, codes=codes)


def _dense_tunstall(packed: PackedExperts, entries: np.ndarray) -> np.ndarray:
    experts, rows, columns = packed.shape
    weights = np.zeros((experts, rows, columns))
    trees = np.asarray(packed.trees)
    for expert in range(experts):
        table = entries.reshape(tunstall_words.TREES, -1)[trees[expert]]
        codes, words = (
            of(packed, expert) for of in (packed_lib.expert_codes, packed_lib.expert_words)
        )
        signs = np.unpackbits(codes[len(words) :].astype("<u2").view(np.uint8), bitorder="little")
        starts = np.asarray(packed.row_starts[expert], np.int64)
        row = np.repeat(np.arange(rows), np.diff(starts))
        entry = table[words]
        length, count = (
            np.cumsum(of(entry), dtype=np.int64) - of(entry)
            for of in (tunstall_words.entry_length, tunstall_words.entry_count)
        )
        begin = length - length[starts[row]]
        values = np.asarray(packed.row_values[expert], np.float64)
        for field in range(tunstall_words.MAX_NONZEROS):
            there = tunstall_words.entry_has(entry, field)
            column = (begin + tunstall_words.entry_position(entry, field))[there]
            weights[expert, row[there], column] = values[row[there], signs[count[there] + field]]
    return weights


def _starts(rows: list[list[np.ndarray]]) -> UInt32[np.ndarray, "experts starts"]:
    counts = np.array([[len(row) for row in expert] for expert in rows])
    return np.pad(np.cumsum(counts, axis=1), ((0, 0), (1, 0))).astype(np.uint32)


def _random_tunstall(entries, case: Case, generator, row_values) -> PackedExperts:
    """Experts that take the trees in turn, with random signs."""
    trees = np.arange(case.experts, dtype=np.uint8) % tunstall_words.TREES
    tables = entries.reshape(tunstall_words.TREES, -1)[trees]
    rows = [_tunstall_rows(table, case, generator) for table in tables]
    starts, words = _starts(rows), [np.concatenate(expert) for expert in rows]
    nonzeros = np.array(
        [
            tunstall_words.row_nonzeros(own, own_starts.astype(np.int64), table)
            for own, own_starts, table in zip(words, starts, tables, strict=True)
        ]
    )
    codes = []
    for own, count in zip(words, nonzeros.sum(axis=1), strict=True):
        bits = np.pad(generator.integers(0, 2, count, np.uint8), (0, -count % 16))
        codes.append(np.concatenate([own, np.packbits(bits, bitorder="little").view("<u2")]))
    more = {"trees": trees, "sign_starts": tunstall_words.sign_starts(nonzeros, starts[:, -1])}
    return packed_lib.assemble(codes, starts, row_values, case.columns, "tunstall", **more)


def _tunstall_rows(
    table: np.ndarray, case: Case, generator: np.random.Generator
) -> list[np.ndarray]:
    """Each row's words as a source of independent weights makes them."""
    length = tunstall_words.entry_length(table).astype(np.int64)
    count = tunstall_words.entry_count(table).astype(np.int64)
    likely = case.zeros ** (length - count) * (1 - case.zeros) ** count
    per_row = case.columns // 4 + 2  # words are of 4 weights or more
    drawn = generator.choice(len(table), (case.rows, per_row), p=likely / likely.sum())
    last = np.choose(
        np.maximum(count, 1) - 1, [tunstall_words.entry_position(table, f) for f in range(4)]
    )
    begin = np.cumsum(length[drawn], axis=1) - length[drawn]
    fits = np.cumprod(begin + last[drawn] < case.columns, axis=1) * (count[drawn] > 0)
    # Zeros that end a row have no words.
    kept = fits.shape[1] - np.argmax(fits[:, ::-1], axis=1)
    kept = np.where(fits.any(axis=1), kept, 0)
    return [words[:n].astype(np.uint16) for words, n in zip(drawn, kept, strict=True)]


def _dictionary_filler(
    entries: np.ndarray, case: Case
) -> Callable[[np.random.Generator], list[np.ndarray]]:
    """What makes the words of each row of an expert."""
    width = case.columns + case.columns % 2
    lengths = dictionary_words.entry_length(entries).astype(np.int64)
    cumulative = np.cumsum(_emissions(entries, case.zeros))
    is_zero = dictionary_words.entry_count(entries) == 0
    zero_words = {int(lengths[w]): w for w in np.flatnonzero(is_zero)}
    tail = np.array([zero_words.get(i, 0) for i in range(32)], np.uint16)
    mean = float(np.diff(cumulative, prepend=0) @ lengths)
    per_row = int(width / mean * 1.3) + 16  # or the rest of the row is zeros

    def fill(generator: np.random.Generator) -> list[np.ndarray]:
        drawn = np.searchsorted(cumulative, generator.random((case.rows, per_row)), side="right")
        drawn = np.minimum(drawn, len(entries) - 1)
        ends = np.cumsum(lengths[drawn], axis=1)
        fits = ends < width
        place = np.take_along_axis(ends, fits.sum(1, keepdims=True) - 1, 1)[:, 0]
        left = np.where(fits.any(1), width - place, width)
        rows = [row[:n] for row, n in zip(drawn.astype(np.uint16), fits.sum(1), strict=True)]
        tails = [[28] * (n // 28) + [n % 28] * bool(n % 28) for n in left.tolist()]
        return [np.append(row, tail[rest]) for row, rest in zip(rows, tails, strict=True)]

    return fill


@functools.cache
def _parents(entries: bytes) -> np.ndarray:
    """The word that each one without its last pair is; -1 for a single pair."""
    table = np.frombuffer(entries, np.uint32)
    words = np.arange(len(table))
    length = dictionary_words.entry_length(table).astype(np.int64)
    trits = np.zeros((len(table), 28), np.uint8)
    for field in range(dictionary_words.MAX_NONZEROS):
        position, sign = dictionary_words.entry_nonzero(table, field)
        there = dictionary_words.entry_has(table, field)
        trits[words[there], position[there]] = sign[there] + 1
    shorter = np.maximum(length - 2, 0)
    trits[words, shorter] = trits[words, shorter + 1] = 0
    wanted = dictionary_words.word_entries(trits, shorter.astype(np.uint8))
    order = np.argsort(table)
    found = order[np.minimum(np.searchsorted(table[order], wanted), len(table) - 1)]
    return np.where((table[found] == wanted) & (shorter > 0), found, -1)


def _emissions(entries: np.ndarray, zeros: float) -> np.ndarray:
    """How often a greedy parse emits each word, such that `zeros` of all weights are 0.

    A word ends where the parse enters it but none of its longer ones. What follows such an end is
    no longer independent of it, which this leaves out: hence the search for the source.
    """
    nonzeros = np.asarray(dictionary_words.entry_count(entries), np.int64)
    length = np.asarray(dictionary_words.entry_length(entries), np.int64)
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
