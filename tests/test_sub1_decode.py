# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import packed as packed_lib
from pallas_kernels import sub1_decode, testing
from pallas_kernels.device import sub1_decode_pallas
from pallas_kernels.testing import PUBLISHED, SMALL, Case
from qmoe_jax.codec import packing

ENTRIES = {codec: packing.entries(codec) for codec in packing.CODECS}
LARGE = [case for case in PUBLISHED if case.rows * case.columns < 2e7]


@pytest.mark.parametrize("codec", packing.CODECS)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, jnp.float32) for case in SMALL] + [(case, jnp.bfloat16) for case in LARGE],
    ids=[case.name for case in (*SMALL, *LARGE)],
)
def test_every_shape_is_exact(case, dtype, codec):
    table = ENTRIES[codec]
    packed = testing.random_packed(table, case, codec=codec)
    experts = jnp.asarray([*range(case.experts)[::-1], case.experts], jnp.int32)
    record, entries = jax.tree.map(jnp.asarray, packed), jnp.asarray(table)
    dense = testing.dense(packed, table)
    by_xla = sub1_decode.sub1_decode(record, entries, experts, dtype=dtype, implementation="xla")
    results = [by_xla]
    if case in SMALL:  # interpreted, every program copies the whole output
        interpret = functools.partial(sub1_decode_pallas.sub1_decode, interpret=True)
        results.append(interpret(record, entries, experts, jnp.dtype(dtype)))
    for found in results:
        assert found.dtype == dtype
        np.testing.assert_array_equal(np.asarray(found[:-1], np.float64), dense[::-1])
        assert not found[-1].any()


@pytest.mark.gpu
@pytest.mark.parametrize("codec", packing.CODECS)
@pytest.mark.parametrize("implementation", ["pallas", "triton"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", [*SMALL, *PUBLISHED], ids=lambda case: case.name)
def test_every_shape_on_the_device(case, dtype, implementation, codec):
    table = ENTRIES[codec]
    packed = testing.random_packed(table, case, codec=codec)
    record, experts = jax.tree.map(jnp.asarray, packed), jnp.arange(case.experts)
    found = sub1_decode.sub1_decode(
        record, jnp.asarray(table), experts, dtype=dtype, implementation=implementation
    )
    np.testing.assert_array_equal(np.asarray(found, np.float64), testing.dense(packed, table))


@pytest.mark.parametrize("codec", packing.CODECS)
def test_a_damaged_row_begins_with_nan_where_checked_and_others_are_whole(codec):
    case, table = Case("some", 24, 300, (1, 1)), ENTRIES[codec]
    packed = testing.random_packed(table, case, codec=codec)
    damaged = jax.tree.map(jnp.asarray, testing.with_a_damaged_row(packed, table, 1, 6))
    found = np.array(
        sub1_decode_pallas.sub1_decode(
            damaged,
            jnp.asarray(table),
            jnp.arange(2),
            jnp.dtype(jnp.float32),
            checked=True,
            interpret=True,
        )
    )
    dense = testing.dense(packed, table)
    assert np.isnan(found[1, 6, 0])
    found[1, 6], dense[1, 6] = 0, 0
    np.testing.assert_array_equal(found, dense.astype(np.float32))


@pytest.mark.parametrize("codec", packing.CODECS)
def test_random_packs_are_those_of_the_codec(codec):
    """As dense and, but for the end of each row, as short as trits that the codec packs."""
    case, table = Case("base wi", 400, 768, (1,)), ENTRIES[codec]
    packed = testing.random_packed(table, case, codec=codec)
    trits = np.asarray(packing.unpack_ternary(packed))
    assert abs((trits == 0).mean() - 0.885) < 0.005
    again = packing.pack_ternary(trits, np.asarray(packed.row_values), codec)
    words, fewest = (int(packed_lib.expert_sizes(record).sum()) for record in (packed, again))
    assert 0.99 * fewest <= words < 1.05 * fewest
    dense = sub1_decode.dequantize(jnp.asarray(trits), jnp.asarray(packed.row_values))
    np.testing.assert_array_equal(dense, testing.dense(packed, table).astype(np.float32))


def test_other_dtypes_are_refused():
    entries = jnp.asarray(ENTRIES["qmoe"])
    packed = jax.tree.map(jnp.asarray, testing.random_packed(ENTRIES["qmoe"], SMALL[0]))
    experts = jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="`dtype` must be float32 or bfloat16, got float16"):
        sub1_decode.sub1_decode(packed, entries, experts, dtype=jnp.float16)
