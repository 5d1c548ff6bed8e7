# SPDX-License-Identifier: Apache-2.0
"""How many rows, lanes and words a warp of a decoding kernel has in hand at a time."""

import dataclasses
import math

from pallas_kernels.packed import PackedExperts

_WARP = 32
_SPREAD = 1.1  # of words a row: the longest of a few rows over the mean
_SHORT_ROW = 48  # words
_WORDS = {"qmoe": 1.0, "tunstall": 0.82}  # of the codes; the rest are signs


@dataclasses.dataclass(frozen=True)
class RowShape:
    """What a warp has in hand at a time."""

    rows: int
    lanes: int  # of each row; a power of two
    words: int  # of each lane

    @property
    def step(self) -> int:
        """Words of a row."""
        return self.lanes * self.words


def row_shape(packed: PackedExperts, most_words: int = 14) -> RowShape:
    """A step that takes a short row at once, and a longer one in equal steps.

    Fewer lanes a row spend fewer instructions on the prefix sum and on a program's beginning and
    end, which more rows then share; more lanes read neighbouring words and columns together.

    Args:
      packed: the record.
      most_words: of a lane in a short row, for all must fit a thread's registers.
    """
    experts, rows, _ = packed.shape
    mean = _WORDS[packed.codec] * packed.codes.size / (experts * rows)
    lanes, most = (4, most_words) if mean <= _SHORT_ROW else (8, 6)
    longest = _SPREAD * mean
    steps = math.ceil(longest / (lanes * most))
    return RowShape(_WARP // lanes, lanes, math.ceil(longest / (lanes * steps)))
