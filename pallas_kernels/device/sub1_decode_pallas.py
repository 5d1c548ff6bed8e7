# SPDX-License-Identifier: Apache-2.0
"""`sub1_decode` as a Pallas kernel, lowered through Triton.

A program is one warp and writes a few rows of one expert: first zeros, in wide stores; then, behind
a barrier, the non-zeros, each where it belongs. The zeros that a non-zero replaces are still in the
cache, so memory sees each line once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.device import rows_of_words_pallas
from pallas_kernels.device.row_shape import RowShape, row_shape
from pallas_kernels.packed import PackedExperts

_CLEARED = 256  # columns a step


@functools.partial(jax.jit, static_argnames=("dtype", "checked", "interpret"))
def sub1_decode(
    packed: PackedExperts,
    entries: UInt32[Array, " words"],
    experts: Int[Array, " n"],
    dtype: DTypeLike,
    *,
    checked: bool = False,
    interpret: bool = False,
) -> Float[Array, "n rows columns"]:
    """See `pallas_kernels.sub1_decode`.

    Args:
      packed, entries, experts, dtype: as there; at least one expert.
      checked: for damaged records: touches nothing outside the arrays, and a row whose words do not
        expand to its columns begins with NaN.
      interpret: run on the CPU.
    """
    shape = row_shape(packed)
    inputs = (experts.astype(jnp.int32), *rows_of_words_pallas.operands(packed), entries)
    barrier = (lambda: None) if interpret else plgpu.debug_barrier  # interpreted in order
    return pl.pallas_call(
        functools.partial(_kernel, packed.shape, shape, checked, barrier),
        out_shape=jax.ShapeDtypeStruct((experts.shape[0], *packed.shape[1:]), dtype),
        grid=(experts.shape[0], pl.cdiv(packed.shape[1], shape.rows)),
        in_specs=[pl.BlockSpec()] * len(inputs),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        name="sub1_decode",
    )(*inputs)


def _kernel(
    packed_shape: tuple[int, int, int],
    shape: RowShape,
    checked: bool,
    barrier,
    experts_ref,  # [n]
    codes_ref,  # [words / 64, 64]
    *refs,  # the record's others, the table [entries], and out [n, rows, columns]
):
    *record_refs, entries_ref, out_ref = refs
    columns = packed_shape[2]
    n, block = pl.program_id(0), pl.program_id(1)
    expert = experts_ref[n]
    rows = rows_of_words_pallas.open_rows(shape, packed_shape, expert, block, *record_refs)
    low, high = (value.astype(out_ref.dtype) for value in (rows.low, rows.high))

    def clear(i, _):
        column = i * _CLEARED + jnp.arange(_CLEARED)
        inside = rows.inside[:, None] & (column < columns)[None, :]
        zeros = jnp.zeros((shape.rows, _CLEARED), out_ref.dtype)
        plgpu.store(out_ref.at[n, rows.row[:, None], column[None, :]], zeros, mask=inside)

    def write(carry, nonzero):
        weight = jnp.where(nonzero.is_high, high, low)
        at = out_ref.at[n, rows.row[:, None], nonzero.column]
        plgpu.store(at, weight, mask=nonzero.present)
        return carry

    jax.lax.fori_loop(0, pl.cdiv(columns, _CLEARED), clear, None)
    barrier()
    _, sound_R = rows_of_words_pallas.for_each_nonzero(
        shape, rows, codes_ref, entries_ref, columns, checked, write, ()
    )
    if checked:
        barrier()
        wrong_R = rows.inside & (expert < packed_shape[0]) & ~sound_R
        nan_R = jnp.full((shape.rows,), jnp.nan, out_ref.dtype)
        plgpu.store(out_ref.at[n, rows.row, 0], nan_R, mask=wrong_R)
