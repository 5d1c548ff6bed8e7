# SPDX-License-Identifier: Apache-2.0
"""How a warp of a Pallas kernel reads rows of words, of either codec; all that decode do it so.

`lanes` lanes share a row and read `words` consecutive words each at a time. Only where its words
begin ties a lane to the others: one prefix sum of the lengths of all its words. Neither words nor
table entries wait for that sum, so the loads of a step are all under way at once. With "tunstall"
the same sum carries the number of non-zeros in its upper half: it tells where a lane's signs are.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import dictionary_words, tunstall_words
from pallas_kernels.device.row_shape import RowShape
from pallas_kernels.packed import BLOCK_WORDS, PackedExperts

Carry = TypeVar("Carry")

_NOTHING = np.uint32(0)
_HALF = 16  # bits; neither lengths nor non-zeros of a step reach 2**16
_LOW = (1 << _HALF) - 1
_WINDOW_WORDS = 4  # of "tunstall"; their 16 signs lie in two units, wherever they begin


class Rows(NamedTuple):
    """Some rows of one expert, as a program sees them."""

    row: jax.Array  # [rows]
    inside: jax.Array  # [rows], whether it is one of the matrix
    base: jax.Array  # the expert's first block of words
    begin: jax.Array  # [rows], first word
    end: jax.Array  # [rows], past the last word
    low: jax.Array  # [rows, 1], in the table's dtype
    high: jax.Array  # [rows, 1]
    tree: Any = None  # of "tunstall": the expert's table
    signs: Any = None  # [rows], the first bit of its signs
    signs_end: Any = None  # [rows], past the last


class Nonzero(NamedTuple):
    """A non-zero of each lane's word, where there is one."""

    column: Any  # [rows, lanes]
    present: Any
    is_high: Any


def operands(packed: PackedExperts) -> tuple[Any, ...]:
    """The arrays of a record that kernels take as refs, in this order, before the table."""
    codes = packed.codes.reshape(-1, BLOCK_WORDS)
    more = () if packed.trees is None else (packed.trees, packed.sign_starts)
    return codes, packed.expert_bases, packed.row_starts, packed.row_values, *more


def open_rows(
    shape: RowShape,
    packed_shape: tuple[int, int, int],
    expert,
    block,
    bases,
    starts,
    values,
    trees=None,
    sign_starts=None,
) -> Rows:
    """Rows `block * shape.rows` and following; of the expert E they have no words."""
    experts, rows, _ = packed_shape
    has_expert, expert = expert < experts, jnp.minimum(expert, experts - 1)
    row = block * shape.rows + jnp.arange(shape.rows)
    inside = row < rows

    def ends(of):
        mask = inside & has_expert
        return [plgpu.load(of.at[expert, row + i], mask=mask, other=_NOTHING) for i in range(2)]

    begin, end = ends(starts)
    low, high = (plgpu.load(values.at[expert, row, i], mask=inside)[:, None] for i in range(2))
    found = Rows(row, inside, bases[expert], begin, end, low, high)
    if trees is None:
        return found
    first, last = ends(sign_starts)
    return found._replace(tree=trees[expert].astype(jnp.int32), signs=first, signs_end=last)


def for_each_nonzero(
    shape: RowShape,
    rows: Rows,
    codes,
    entries,
    columns: int,
    checked: bool,
    visit: Callable[[Carry, Nonzero], Carry],
    carry: Carry,
) -> tuple[Carry, Any]:
    """Visits all non-zeros of the rows, some of each row at a time.

    Args:
      codes, entries: refs.
      columns: of the matrix.
      checked: leave out what lies outside of `codes` or of the row.
      visit: called once for each field of each word that a lane has in hand.

    Returns:
      What the visits made of `carry`, and whether each row is sound, [rows]; only if `checked`.
    """
    if rows.tree is None:
        return _of_dictionary(shape, rows, codes, entries, columns, checked, visit, carry)
    return _of_trees(shape, rows, codes, entries, columns, checked, visit, carry)


def _of_dictionary(shape, rows: Rows, codes, entries, columns, checked, visit, carry):
    def step(i, state):
        place_R, carry = state
        found = _entries(shape, rows, i, codes, entries, checked)
        lengths = [dictionary_words.entry_length(entry).astype(jnp.int32) for entry in found]
        length = sum(lengths[1:], lengths[0])
        ends = jnp.cumsum(length, axis=1)
        begins, nonzeros = place_R[:, None] + ends - length, []
        for entry, length in zip(found, lengths, strict=True):
            for field in range(dictionary_words.MAX_NONZEROS):
                position, sign = dictionary_words.entry_nonzero(entry, field)
                column = begins + position.astype(jnp.int32)
                present = dictionary_words.entry_has(entry, field)
                if checked:
                    present &= column < columns
                nonzeros.append(Nonzero(column, present, sign != 0))
            begins += length
        carry = functools.reduce(visit, nonzeros, carry)
        return place_R + jnp.max(ends, axis=1), carry

    state = jnp.zeros((shape.rows,), jnp.int32), carry
    place_R, carry = jax.lax.fori_loop(0, _steps(shape, rows), step, state)
    return carry, place_R == columns + columns % 2


def _of_trees(shape, rows: Rows, codes, entries, columns, checked, visit, carry):
    def step(i, state):
        place_R, sign_R, outside_R, carry = state
        found = _entries(shape, rows, i, codes, entries, checked)
        both = [
            tunstall_words.entry_length(entry) + (tunstall_words.entry_count(entry) << _HALF)
            for entry in found
        ]
        sum_RL = sum(both[1:], both[0])
        ends_RL = jnp.cumsum(sum_RL, axis=1)
        before_RL = ends_RL - sum_RL
        begin_RL = place_R[:, None] + (before_RL & _LOW).astype(jnp.int32)
        sign_RL = sign_R[:, None] + (before_RL >> _HALF)
        window_RL, nonzeros = sign_RL, []
        for w, entry in enumerate(found):
            if w % _WINDOW_WORDS == 0:
                unit_RL = sign_RL >> 4
                window_RL = _unit(rows, unit_RL, entry > 0, codes, checked)
                more_RL = _unit(rows, unit_RL + 1, entry > 0, codes, checked)
                window_RL = (window_RL | more_RL << _HALF) >> (sign_RL & 15)
            for field in range(tunstall_words.MAX_NONZEROS):
                position = tunstall_words.entry_position(entry, field)
                column = begin_RL + position.astype(jnp.int32)
                present = tunstall_words.entry_has(entry, field)
                if checked:
                    outside = (present & (column >= columns)).astype(jnp.int32)
                    outside_R += jnp.sum(outside, axis=1)
                    present &= column < columns
                is_high = ((window_RL >> field) & 1) != 0
                nonzeros.append(Nonzero(column, present, is_high))
            count = tunstall_words.entry_count(entry)
            begin_RL += tunstall_words.entry_length(entry).astype(jnp.int32)
            sign_RL += count
            window_RL >>= count
        carry = functools.reduce(visit, nonzeros, carry)
        total_R = jnp.max(ends_RL, axis=1)
        place_R += (total_R & _LOW).astype(jnp.int32)
        return place_R, sign_R + (total_R >> _HALF), outside_R, carry

    nothing_R = jnp.zeros((shape.rows,), jnp.int32)
    state = nothing_R, rows.signs, nothing_R, carry
    state = jax.lax.fori_loop(0, _steps(shape, rows), step, state)
    _, sign_R, outside_R, carry = state
    return carry, (outside_R == 0) & (sign_R == rows.signs_end)


def _steps(shape: RowShape, rows: Rows) -> jax.Array:
    """How many steps the longest row takes."""
    words = jnp.max((rows.end - rows.begin).astype(jnp.int32))
    return (words + shape.step - 1) // shape.step


def _entries(shape: RowShape, rows: Rows, i, codes, entries, checked: bool) -> list[jax.Array]:
    """The table entries of each lane's words in step `i`; 0 where there is no word."""
    lane = jnp.arange(shape.lanes, dtype=jnp.uint32) * shape.words
    first = rows.begin[:, None] + lane[None, :] + (i * shape.step).astype(jnp.uint32)
    found = []
    for w in range(shape.words):
        inside = first + w < rows.end[:, None]
        at = _unit(rows, first + w, inside, codes, checked).astype(jnp.int32)
        if rows.tree is not None:
            at += rows.tree * tunstall_words.WORDS
        found.append(plgpu.load(entries.at[at], mask=inside, other=_NOTHING))
    return found


def _unit(rows: Rows, offset, mask, codes, checked: bool) -> jax.Array:
    """The units at these offsets from the expert's base, as uint32; 0 where there is none."""
    where = rows.base + (offset >> 6)
    if checked:
        mask &= where < codes.shape[0]
    unit = plgpu.load(codes.at[where, offset & 63], mask=mask, other=np.uint16(0))
    return unit.astype(jnp.uint32)
