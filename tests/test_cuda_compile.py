# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiles for NVIDIA GPUs, without spills, on a machine that has none."""

import functools
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import testing
from pallas_kernels.testing import Case
from qmoe_jax.codec import packing

if sys.platform != "linux":
    pytest.skip("the triton package is for Linux", allow_module_level=True)

from pallas_kernels import cuda_compile
from pallas_kernels.device import (
    gptq_block_triton,
    grouped_matmul_triton,
    sub1_decode_triton,
    sub1_matmul_triton,
)
from pallas_kernels.token_tiles import TokenTiles

Shape = jax.ShapeDtypeStruct
SOME = jnp.zeros(20, jnp.int32)
TILES = TokenTiles(SOME, SOME, SOME)
SHORT_ROWS, LONG_ROWS = Case("short", 96, 768, (1,) * 8), Case("long", 32, 3072, (1,) * 8)
MIDDLE_ROWS = Case("middle", 72, 1024, (1,) * 8)  # the most words a lane


BOTH_CODECS = pytest.mark.parametrize("codec", packing.CODECS)


def packed(case: Case, codec: packing.Codec):
    return testing.random_packed(packing.entries(codec), case, codec=codec)


def abstract(case: Case, codec: packing.Codec):
    """A record and its table."""
    arrays = packed(case, codec), packing.entries(codec)
    return jax.tree.map(lambda array: Shape(array.shape, array.dtype), arrays)


def assert_sound(kernel: cuda_compile.CompiledKernel, capability: int) -> None:
    assert kernel.capability == capability
    assert kernel.spilled_bytes == 0, f"{kernel.name} spills {kernel.spilled_bytes} bytes a thread"
    assert not any(text.startswith(("STL", "LDL")) for text in kernel.instructions)
    assert 16 <= kernel.registers <= 168
    assert kernel.shared_bytes <= 48 << 10
    assert any(text.startswith("EXIT") for text in kernel.instructions)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("height", [1, 8])
@pytest.mark.parametrize("case", [SHORT_ROWS, LONG_ROWS], ids=lambda case: case.name)
@BOTH_CODECS
def test_sub1_matmul(codec, case, height, capability):
    from pallas_kernels import token_tiles
    from pallas_kernels.device import sub1_matmul_pallas

    tokens = case.experts * height

    def run(x, packed, entries, sizes):
        tiles = token_tiles.token_tiles(sizes, tokens, height)
        return sub1_matmul_pallas.sub1_matmul(x, packed, entries, tiles, height)

    x = Shape((tokens, case.columns), jnp.bfloat16)
    sizes = Shape((case.experts,), jnp.int32)
    arguments = (x, *abstract(case, codec), sizes)
    (kernel,) = cuda_compile.compile_kernels(run, *arguments, capability=capability)
    assert kernel.name == "sub1_matmul"
    assert_sound(kernel, capability)
    assert not any(text.startswith("BAR") for text in kernel.instructions)  # a warp by itself


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", [SHORT_ROWS, LONG_ROWS], ids=lambda case: case.name)
@BOTH_CODECS
def test_sub1_decode(codec, case, capability):
    from pallas_kernels.device import sub1_decode_pallas

    def run(packed, entries, experts):
        return sub1_decode_pallas.sub1_decode(packed, entries, experts, jnp.dtype(jnp.bfloat16))

    arguments = (*abstract(case, codec), Shape((4,), jnp.int32))
    (kernel,) = cuda_compile.compile_kernels(run, *arguments, capability=capability)
    assert kernel.name == "sub1_decode"
    assert_sound(kernel, capability)


def test_a_function_without_kernels_is_named():
    with pytest.raises(RuntimeError, match="no Triton kernel"):
        cuda_compile.compile_kernels(jnp.sin, Shape((4,), jnp.float32))


def test_executed_instructions_follow_the_longest_loop():
    kernel = cuda_compile.CompiledKernel("k", 90, 1, 32, 0, 0, ("A", "B", "C", "NOP"), ((1, 2),))
    assert [kernel.executed(trips) for trips in (0.0, 1.0, 10.0)] == [1, 3, 21]


# One for all columns; and with thresholds of each.
GRIDS = [("ternary", (2, 16, 1, 1024)), ("ternary", (4, 16, 128, 1024)), (2, (2, 16, 1, 1024))]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("bits", "grid"), GRIDS)
def test_gptq_block(bits, grid, capability):
    from pallas_kernels.device import gptq_block_pallas

    shapes = ((16, 128, 1024), (16, 128, 1024), (16, 128, 128), grid)
    (kernel,) = cuda_compile.compile_kernels(
        functools.partial(gptq_block_pallas.gptq_block, bits=bits),
        *(Shape(shape, jnp.float32) for shape in shapes),
        capability=capability,
    )
    assert kernel.name == "gptq_block"
    assert_sound(kernel, capability)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_grouped_matmul(dtype, capability):
    from pallas_kernels import grouped_matmul

    (kernel,) = cuda_compile.compile_kernels(
        functools.partial(grouped_matmul.grouped_matmul, implementation="pallas"),
        *(Shape((512, 768), dtype), Shape((8, 3072, 768), dtype), Shape((8,), jnp.int32)),
        capability=capability,
    )
    assert kernel.name == "grouped_matmul"
    assert_sound(kernel, capability)
    on_tensor_cores = any(text.startswith(("HMMA", "HGMMA")) for text in kernel.instructions)
    assert on_tensor_cores == (dtype is jnp.bfloat16)  # TF32 would round float32


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("case", "height"), [(SHORT_ROWS, 1), (LONG_ROWS, 1), (MIDDLE_ROWS, 8)], ids=str
)
@BOTH_CODECS
def test_sub1_matmul_in_triton(codec, case, height, capability):
    _, entries = abstract(case, codec)
    tokens = case.experts * height
    x = jnp.zeros((tokens, case.columns), jnp.bfloat16)
    launch = sub1_matmul_triton.plan(x, packed(case, codec), entries, TILES, height)
    kernel = cuda_compile.compile_launch(launch, capability=capability)
    assert kernel.name == "sub1_matmul_kernel"
    assert_sound(kernel, capability)
    assert not any(text.startswith("BAR") for text in kernel.instructions)  # a warp by itself


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", [SHORT_ROWS, LONG_ROWS], ids=lambda case: case.name)
@BOTH_CODECS
def test_sub1_decode_in_triton(codec, case, capability):
    dtype, (_, entries) = jnp.dtype(jnp.bfloat16), abstract(case, codec)
    for checked in (False, True):
        launch = sub1_decode_triton.plan(packed(case, codec), entries, SOME, dtype, checked=checked)
        assert_sound(cuda_compile.compile_launch(launch, capability=capability), capability)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("bits", "grid"), GRIDS)
def test_gptq_block_in_triton(bits, grid, capability):
    shapes = ((16, 128, 1024), (16, 128, 1024), (16, 128, 128), grid)
    launch = gptq_block_triton.plan(*map(jnp.zeros, shapes), bits=bits)
    assert_sound(cuda_compile.compile_launch(launch, capability=capability), capability)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_grouped_matmul_in_triton(dtype, capability):
    x, weights = jnp.zeros((64, 768), dtype), jnp.zeros((2, 3072, 768), dtype)
    launch = grouped_matmul_triton.plan(x, weights, TILES, grouped_matmul_triton.tile(dtype))
    kernel = cuda_compile.compile_launch(launch, capability=capability)
    assert_sound(kernel, capability)
    on_tensor_cores = any(text.startswith(("HMMA", "HGMMA")) for text in kernel.instructions)
    assert on_tensor_cores == (dtype is jnp.bfloat16)  # TF32 would round float32
