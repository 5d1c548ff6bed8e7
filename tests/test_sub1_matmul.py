# SPDX-License-Identifier: Apache-2.0
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import packed as packed_lib
from pallas_kernels import sub1_matmul, testing, token_tiles
from pallas_kernels.device import sub1_matmul_pallas
from pallas_kernels.testing import PUBLISHED, SMALL, Case
from qmoe_jax.codec import packing

ENTRIES = {codec: packing.entries(codec) for codec in packing.CODECS}
ON_CPU = [case for case in (*SMALL, *PUBLISHED) if case.rows * case.columns < 2e7]
NAMES = [case.name for case in ON_CPU]


def inputs(case: Case, dtype=jnp.float32, codec: str = "qmoe", seed: int = 0) -> tuple[Any, ...]:
    """Tokens, the record on the device, its table, group sizes, and the products in float64."""
    packed = testing.random_packed(ENTRIES[codec], case, seed, codec)
    x = np.random.default_rng(seed).standard_normal((case.tokens, case.columns))
    x = jnp.asarray(x, dtype)
    weights = testing.dense(packed, ENTRIES[codec])
    expert = np.repeat(np.arange(case.experts), case.group_sizes)
    products = np.zeros((case.tokens, case.rows))
    for token, e in enumerate(expert):
        products[token] = weights[e] @ np.asarray(x[token], np.float64)
    sizes = jnp.asarray(case.group_sizes, jnp.int32)
    return x, jax.tree.map(jnp.asarray, packed), jnp.asarray(ENTRIES[codec]), sizes, products


def assert_close(found, products, dtype) -> None:
    assert found.dtype == dtype and found.shape == products.shape
    scale = np.abs(products).max(initial=1.0)
    tolerance = scale * (2e-6 if dtype == jnp.float32 else 2**-8)
    np.testing.assert_allclose(np.asarray(found, np.float64), products, rtol=0, atol=tolerance)


def by_pallas(x, packed, entries, sizes, height=None, **options):
    height = height or sub1_matmul.tile_tokens(x.shape[0], packed.shape[0])
    tiles = token_tiles.token_tiles(sizes, x.shape[0], height)
    return sub1_matmul_pallas.sub1_matmul(
        x, packed, entries, tiles, height, interpret=True, **options
    )


BFLOAT16 = ("odd width", "uneven", "base wi")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, jnp.float32) for case in ON_CPU]
    + [(case, jnp.bfloat16) for case in ON_CPU if case.name in BFLOAT16],
    ids=[*NAMES, *(f"{name} bfloat16" for name in BFLOAT16)],
)
@pytest.mark.parametrize("codec", packing.CODECS)
def test_every_shape(case, dtype, codec):
    *arguments, products = inputs(case, dtype, codec)
    assert_close(sub1_matmul.sub1_matmul(*arguments, implementation="xla"), products, dtype)
    if case.tokens:
        assert_close(by_pallas(*arguments), products, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("codec", packing.CODECS)
@pytest.mark.parametrize("implementation", ["pallas", "triton"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", [*SMALL, *PUBLISHED], ids=lambda case: case.name)
def test_every_shape_on_the_device(case, dtype, implementation, codec):
    *arguments, products = inputs(case, dtype, codec)
    found = sub1_matmul.sub1_matmul(*arguments, implementation=implementation)
    assert_close(found, products, dtype)


@pytest.mark.parametrize("codec", packing.CODECS)
@pytest.mark.parametrize("height", [1, 2, 4, 8])
def test_every_height_of_tiles(height, codec):
    *arguments, products = inputs(SMALL[NAMES.index("uneven")], codec=codec)
    assert_close(by_pallas(*arguments, height=height), products, jnp.float32)


def test_no_tokens_at_all():
    case = Case("none", 8, 64, (0, 0))
    *arguments, _ = inputs(case)
    found = sub1_matmul.sub1_matmul(*arguments, implementation="xla")
    assert found.shape == (0, 8)


@pytest.mark.parametrize(
    ("tokens", "experts", "height"), [(1, 128, 1), (8, 8, 1), (64, 8, 8), (512, 1, 8), (4, 1, 4)]
)
def test_height_follows_tokens_of_an_expert(tokens, experts, height):
    assert sub1_matmul.tile_tokens(tokens, experts) == height


@pytest.mark.parametrize("codec", packing.CODECS)
def test_a_damaged_row_is_nan_where_checked_and_others_are_not(codec):
    case, row = SMALL[NAMES.index("uneven")], 5
    x, packed, entries, sizes, products = inputs(case, codec=codec)
    record = packed_lib.to_host(packed)
    damaged = jax.tree.map(jnp.asarray, testing.with_a_damaged_row(record, ENTRIES[codec], 2, row))
    found = np.asarray(by_pallas(x, damaged, entries, sizes, checked=True))
    owner = np.repeat(np.arange(case.experts), case.group_sizes)
    wrong = np.zeros(found.shape, bool)
    wrong[np.flatnonzero(owner == 2), row] = True
    np.testing.assert_array_equal(np.isnan(found), wrong)
    np.testing.assert_allclose(found[~wrong], products[~wrong], atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": jnp.zeros((2, 5))}, r"`x` must be float32 or bfloat16 \[tokens, 64\]"),
        ({"group_sizes": jnp.zeros(3, jnp.int32)}, r"`group_sizes` must be integers \[2\]"),
        ({"entries": jnp.zeros(9, jnp.uint32)}, r"`entries` of codec .* must be uint32 \[65536\]"),
    ],
)
def test_arguments_that_do_not_fit(change, words):
    x, packed, entries, sizes, _ = inputs(Case("small", 8, 64, (1, 1)))
    given = {"x": x, "packed": packed, "entries": entries, "group_sizes": sizes} | change
    with pytest.raises(ValueError, match=words):
        sub1_matmul.sub1_matmul(**given)


def test_a_record_of_several_slabs_is_refused():
    x, packed, entries, sizes, _ = inputs(Case("small", 8, 64, (1, 1)))
    halves = jnp.tile(packed.codes, (2, 1))
    with pytest.raises(ValueError, match="2 slabs; expected one"):
        sub1_matmul.sub1_matmul(x, dataclasses.replace(packed, codes=halves), entries, sizes)
