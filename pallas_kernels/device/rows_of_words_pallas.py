# SPDX-License-Identifier: Apache-2.0
"""How a warp of a Pallas kernel reads rows of dictionary words; all that decode do it so.

`lanes` lanes share a row and read `words` consecutive words each at a time. Only where its words
begin ties a lane to the others: one prefix sum of the lengths of all its words. Neither words nor
table entries wait for that sum, so the loads of a step are all under way at once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import packed as packed_lib
from pallas_kernels.device.row_shape import RowShape
from pallas_kernels.packed import BLOCK_WORDS, MAX_NONZEROS, PackedExperts

_NOTHING = np.uint32(0)


class Rows(NamedTuple):
    """Some rows of one expert, as a program sees them."""

    row: jax.Array  # [rows]
    inside: jax.Array  # [rows], whether it is one of the matrix
    base: jax.Array  # the expert's first block of words
    begin: jax.Array  # [rows], first word
    end: jax.Array  # [rows], past the last word
    low: jax.Array  # [rows, 1], in the table's dtype
    high: jax.Array  # [rows, 1]


class Nonzero(NamedTuple):
    """A non-zero of each lane's word, where there is one."""

    column: Any  # [rows, lanes]
    present: Any
    is_high: Any


def operands(packed: PackedExperts) -> tuple[Any, ...]:
    """What `open_rows` and `read_step` take as refs, in this order, before the table."""
    codes = packed.codes.reshape(-1, BLOCK_WORDS)
    return codes, packed.expert_bases, packed.row_starts, packed.row_values


def open_rows(
    shape: RowShape, packed_shape: tuple[int, int, int], expert, block, bases, starts, values
) -> Rows:
    """Rows `block * shape.rows` and following; of the expert E they have no words."""
    experts, rows, _ = packed_shape
    has_expert, expert = expert < experts, jnp.minimum(expert, experts - 1)
    row = block * shape.rows + jnp.arange(shape.rows)
    inside = row < rows
    begin, end = (
        plgpu.load(starts.at[expert, row + i], mask=inside & has_expert, other=_NOTHING)
        for i in range(2)
    )
    low, high = (plgpu.load(values.at[expert, row, i], mask=inside)[:, None] for i in range(2))
    return Rows(row, inside, bases[expert], begin, end, low, high)


def steps(shape: RowShape, rows: Rows) -> jax.Array:
    """How many steps the longest row takes."""
    words = jnp.max((rows.end - rows.begin).astype(jnp.int32))
    return (words + shape.step - 1) // shape.step


def read_step(
    shape: RowShape, rows: Rows, i, place, codes, entries, columns: int, checked: bool
) -> tuple[list[Nonzero], jax.Array]:
    """The non-zeros of step `i` and where the next one begins.

    Args:
      place: [rows], the column at which this step begins.
      codes, entries: refs.
      columns: of the matrix.
      checked: leave out what lies outside of `codes` or of the row.
    """
    lane = jnp.arange(shape.lanes, dtype=jnp.uint32) * shape.words
    first = rows.begin[:, None] + lane[None, :] + (i * shape.step).astype(jnp.uint32)
    found = []
    for w in range(shape.words):
        offset, inside = first + w, first + w < rows.end[:, None]
        where = rows.base + (offset >> 6)
        if checked:
            inside &= where < codes.shape[0]
        word = plgpu.load(codes.at[where, offset & 63], mask=inside, other=np.uint16(0))
        at = word.astype(jnp.int32)
        found.append(plgpu.load(entries.at[at], mask=inside, other=_NOTHING))
    lengths = [packed_lib.entry_length(entry).astype(jnp.int32) for entry in found]
    length = sum(lengths[1:], lengths[0])
    ends = jnp.cumsum(length, axis=1)
    begins = place[:, None] + ends - length
    nonzeros = []
    for entry, length in zip(found, lengths, strict=True):
        for field in range(MAX_NONZEROS):
            position, sign = packed_lib.entry_nonzero(entry, field)
            column = begins + position.astype(jnp.int32)
            present = packed_lib.entry_has(entry, field)
            if checked:
                present &= column < columns
            nonzeros.append(Nonzero(column, present, sign != 0))
        begins += length
    return nonzeros, place + jnp.max(ends, axis=1)
