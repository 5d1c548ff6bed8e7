# SPDX-License-Identifier: Apache-2.0
"""`sub1_matmul` as a Pallas kernel, lowered through Triton.

A program is one warp (no barriers) and multiplies one tile of tokens with a few rows. Each lane
visits the non-zeros of its words: a gather from each token, a multiply and an add.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, UInt32

from pallas_kernels.device import rows_of_words_pallas
from pallas_kernels.device.row_shape import RowShape, row_shape
from pallas_kernels.packed import PackedExperts
from pallas_kernels.token_tiles import TokenTiles


@functools.partial(jax.jit, static_argnames=("height", "checked", "interpret"))
def sub1_matmul(
    x: Float[Array, "tokens columns"],
    packed: PackedExperts,
    entries: UInt32[Array, " words"],
    tiles: TokenTiles,
    height: int,
    *,
    checked: bool = False,
    interpret: bool = False,
) -> Float[Array, "tokens rows"]:
    """See `pallas_kernels.sub1_matmul`.

    Args:
      x, packed, entries: as there; at least one token.
      tiles, height: the tiles of `x` and their tokens.
      checked: for damaged records: reads nothing outside the arrays, and a row whose words do not
        expand to its columns gives NaN.
      interpret: run on the CPU.
    """
    shape = row_shape(packed)
    tile_refs = (tiles.expert, tiles.first, tiles.stop)
    inputs = (*tile_refs, x, *rows_of_words_pallas.operands(packed), entries)
    rows = packed.shape[1]
    return pl.pallas_call(
        functools.partial(_kernel, packed.shape, shape, height, checked),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], rows), x.dtype),
        grid=(tiles.expert.shape[0], pl.cdiv(rows, shape.rows)),
        in_specs=[pl.BlockSpec()] * len(inputs),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        name="sub1_matmul",
    )(*inputs)


def _kernel(
    packed_shape: tuple[int, int, int],
    shape: RowShape,
    height: int,
    checked: bool,
    expert_ref,  # [tiles], as the next two
    first_ref,
    stop_ref,
    x_ref,  # [tokens, columns]
    codes_ref,  # [words / 64, 64]
    *refs,  # the record's others, the table [entries], and y [tokens, rows]
):
    *record_refs, entries_ref, y_ref = refs
    columns = packed_shape[2]
    tile, block = pl.program_id(0), pl.program_id(1)
    expert, first, stop = expert_ref[tile], first_ref[tile], stop_ref[tile]
    rows = rows_of_words_pallas.open_rows(shape, packed_shape, expert, block, *record_refs)
    low, high = (value.astype(jnp.float32) for value in (rows.low, rows.high))
    # A tile's last tokens may be missing: then the last one is read again, and not stored.
    tokens = [jnp.minimum(first + t, x_ref.shape[0] - 1) for t in range(height)]

    def multiply(sums, nonzero):
        weight, sums = jnp.where(nonzero.is_high, high, low), list(sums)
        for t, token in enumerate(tokens):
            at, zero = x_ref.at[token, nonzero.column], jnp.zeros((), x_ref.dtype)
            value = plgpu.load(at, mask=nonzero.present, other=zero)
            sums[t] += weight * value.astype(jnp.float32)
        return tuple(sums)

    zeros = (jnp.zeros((shape.rows, shape.lanes), jnp.float32),) * height
    sums, sound_R = rows_of_words_pallas.for_each_nonzero(
        shape, rows, codes_ref, entries_ref, columns, checked, multiply, zeros
    )
    for t in range(height):
        y_R = jnp.sum(sums[t], axis=1)
        if checked:
            y_R = jnp.where(sound_R | (expert >= packed_shape[0]), y_R, jnp.nan)
        stored_R = rows.inside & (first + t < stop)
        plgpu.store(y_ref.at[first + t, rows.row], y_R.astype(y_ref.dtype), mask=stored_R)
