# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in Triton's interpreter, against the references. What Triton decorates is
interpreted or compiled for the whole process: pytest runs this file once more in one of its own."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_gptq_block
import test_grouped_matmul
import test_sub1_matmul
from test_sub1_matmul import ENTRIES

from pallas_kernels import packed as packed_lib
from pallas_kernels import sub1_decode, sub1_matmul, testing, token_tiles
from pallas_kernels.testing import SMALL, Case
from qmoe_jax.codec import packing
from qmoe_jax.quantization import columns, gptq
from qmoe_jax.quantization.gptq import GptqOptions

if sys.platform != "linux":
    pytest.skip("the triton package is for Linux", allow_module_level=True)

import triton_interpreter

from pallas_kernels.device import (
    gptq_block_triton,
    grouped_matmul_triton,
    sub1_decode_triton,
    sub1_matmul_triton,
)

VARIABLE = "TRITON_INTERPRET"
# A few rows of each published width.
WIDTHS = [Case(f"width {columns}", 5, columns, (1, 2)) for columns in (768, 2080, 10240)]
CASES = [*SMALL, *WIDTHS]


@pytest.fixture(autouse=True)
def interpreted(request):
    if os.environ.get(VARIABLE) != "1" and request.function is not test_in_the_interpreter:
        pytest.skip("`test_in_the_interpreter` provides it")


@pytest.mark.slow
def test_in_the_interpreter():
    if os.environ.get(VARIABLE) == "1":
        pytest.skip("the other tests run in it")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {VARIABLE: "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 skipped" in done.stdout, done.stdout  # this test


def multiply(x, packed, entries, sizes, height=None, **options) -> np.ndarray:
    height = height or sub1_matmul.tile_tokens(x.shape[0], packed.shape[0])
    tiles = token_tiles.token_tiles(sizes, x.shape[0], height)
    plan = sub1_matmul_triton.plan(x, packed, entries, tiles, height, **options)
    return triton_interpreter.run(plan)


@pytest.mark.parametrize("codec", packing.CODECS)
@pytest.mark.parametrize("case", [c for c in CASES if c.tokens], ids=lambda case: case.name)
def test_products_of_packed_experts(case, codec):
    *arguments, products = test_sub1_matmul.inputs(case, codec=codec)
    test_sub1_matmul.assert_close(multiply(*arguments), products, jnp.float32)


def test_products_in_bfloat16():
    """The interpreter cuts float32 off where a GPU rounds."""
    *arguments, products = test_sub1_matmul.inputs(WIDTHS[1], jnp.bfloat16)
    found = multiply(*arguments).astype(np.float64)
    np.testing.assert_allclose(found, products, rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize("codec", packing.CODECS)
@pytest.mark.parametrize("height", [1, 4])
def test_every_height_of_tiles(height, codec):
    case = next(case for case in SMALL if case.name == "odd width")
    *arguments, products = test_sub1_matmul.inputs(case, codec=codec)
    found = multiply(*arguments, height=height)
    test_sub1_matmul.assert_close(found, products, jnp.float32)


@pytest.mark.parametrize("codec", packing.CODECS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_decoding(case, dtype, codec):
    entries = jnp.asarray(ENTRIES[codec])
    packed = jax.tree.map(jnp.asarray, testing.random_packed(ENTRIES[codec], case, codec=codec))
    experts = jnp.asarray([case.experts, *range(min(case.experts, 4))])
    plan = sub1_decode_triton.plan(packed, entries, experts, dtype)
    expected = sub1_decode.sub1_decode_xla(packed, entries, experts, dtype)
    np.testing.assert_array_equal(triton_interpreter.run(plan), expected)


@pytest.mark.parametrize("codec", packing.CODECS)
def test_damaged_rows_are_nan_where_checked(codec):
    case = next(case for case in SMALL if case.name == "uneven")
    x, packed, entries, sizes, products = test_sub1_matmul.inputs(case, codec=codec)
    expert, row = 2, 5
    record = packed_lib.to_host(packed)
    damaged = jax.tree.map(
        jnp.asarray, testing.with_a_damaged_row(record, ENTRIES[codec], expert, row)
    )

    found = multiply(x, damaged, entries, sizes, checked=True)
    owner = np.repeat(np.arange(case.experts), case.group_sizes)
    wrong = np.zeros(found.shape, bool)
    wrong[np.flatnonzero(owner == expert), row] = True
    np.testing.assert_array_equal(np.isnan(found), wrong)
    np.testing.assert_allclose(found[~wrong], products[~wrong], atol=1e-4)

    experts = jnp.asarray([expert, case.experts])
    plan = sub1_decode_triton.plan(damaged, entries, experts, jnp.float32, checked=True)
    dense = triton_interpreter.run(plan)
    expected = np.array(sub1_decode.sub1_decode_xla(packed, entries, experts, jnp.float32))
    assert np.isnan(dense[0, row, 0])
    np.testing.assert_array_equal(np.delete(dense, row, 1), np.delete(expected, row, 1))


@pytest.mark.parametrize("case", test_grouped_matmul.CASES)
def test_products_of_dense_experts(case):
    """In float32: the interpreter's `dot` takes bfloat16 for integers."""
    x, weights, sizes, expected = test_grouped_matmul.inputs(case, jnp.float32)
    tiles = token_tiles.token_tiles(sizes, len(x), 16)
    found = triton_interpreter.run(grouped_matmul_triton.plan(x, weights, tiles, 16))
    test_grouped_matmul.assert_close(found, expected, jnp.float32)


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize(("bits", "thresholds"), test_gptq_block.KINDS)
@pytest.mark.parametrize("shape", test_gptq_block.SHAPES[:3:2])
def test_blocks_of_gptq(shape, bits, thresholds, by_column):
    given = test_gptq_block.inputs(shape, bits, by_column, thresholds)
    expected = test_gptq_block.column_by_column(*given, bits=bits)
    found = triton_interpreter.run(gptq_block_triton.plan(*given, bits=bits))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_goldens_of_gptq_level_for_level(data_dir, monkeypatch):
    def by_triton(target, weights, scaled, grid, bits):
        def run(*arrays):
            return triton_interpreter.run(gptq_block_triton.plan(*arrays, bits=bits))

        out = jax.ShapeDtypeStruct(weights.shape, weights.dtype)
        return jax.pure_callback(run, out, target, weights, scaled, grid)

    with np.load(data_dir / "qmoe" / "gptq.npz") as file:
        arrays = dict(file)
    name = next(key.removesuffix("/W") for key in arrays if key.endswith("/W"))
    kernel = jnp.asarray(arrays[f"{name}/W"]).swapaxes(-1, -2)
    hessian = jnp.asarray(arrays[f"{name}/H"])
    for bits in ("ternary", 2):
        solve = functools.partial(gptq.gptq, kernel, hessian, bits=bits, options=GptqOptions())
        expected = solve()
        with monkeypatch.context() as patch:
            patch.setattr(columns, "gptq_block", by_triton)
            jax.clear_caches()
            found = solve()
        jax.clear_caches()
        np.testing.assert_array_equal(found.levels, expected.levels)
