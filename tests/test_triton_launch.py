# SPDX-License-Identifier: Apache-2.0
import functools
import sys
import types

import jax
import jax.numpy as jnp
import pytest
import test_gptq_block
import test_grouped_matmul
from test_sub1_matmul import inputs

from pallas_kernels import (
    gptq_block,
    grouped_matmul,
    sub1_decode,
    sub1_matmul,
    testing,
    token_tiles,
)

if sys.platform != "linux":
    pytest.skip("the triton package is for Linux", allow_module_level=True)

from pallas_kernels.device import (
    gptq_block_triton,
    grouped_matmul_triton,
    sub1_decode_triton,
    sub1_matmul_triton,
    triton_launch,
)

VERSIONS = [
    ((0, 10, 2), "0.3.1", True),
    ((0, 11, 2), "0.4.1", True),
    ((0, 12, 0), "0.4.1", False),
    ((0, 12, 0), "0.4.2", True),
]
CASE = next(case for case in testing.SMALL if case.name == "odd width")


def calls():
    """Each operation: by its public function, and by its plan with the arguments of that."""
    x, packed, entries, sizes, _ = inputs(CASE)
    tiles = token_tiles.token_tiles(sizes, len(x), 1)
    experts = jnp.arange(2)
    dense_x, weights, dense_sizes, _ = test_grouped_matmul.inputs(
        test_grouped_matmul.CASES[2], "f4"
    )
    dense_tiles = token_tiles.token_tiles(dense_sizes, len(dense_x), 32)
    block = test_gptq_block.inputs((2, 128, 50), "ternary", False)
    by_triton = {"implementation": "triton"}
    return {
        "sub1_matmul": (
            functools.partial(sub1_matmul.sub1_matmul, x, packed, entries, sizes, **by_triton),
            lambda: sub1_matmul_triton.plan(x, packed, entries, tiles, 1),
        ),
        "sub1_decode": (
            functools.partial(sub1_decode.sub1_decode, packed, entries, experts, **by_triton),
            lambda: sub1_decode_triton.plan(packed, entries, experts, jnp.bfloat16),
        ),
        "grouped_matmul": (
            functools.partial(
                grouped_matmul.grouped_matmul, dense_x, weights, dense_sizes, **by_triton
            ),
            lambda: grouped_matmul_triton.plan(dense_x, weights, dense_tiles, 32),
        ),
        "gptq_block": (
            functools.partial(gptq_block.gptq_block, *block, "ternary", **by_triton),
            lambda: gptq_block_triton.plan(*block, bits="ternary"),
        ),
    }


@pytest.mark.parametrize("name", ["sub1_matmul", "sub1_decode", "grouped_matmul", "gptq_block"])
def test_without_jax_triton_the_error_says_what_to_install(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    with pytest.raises(ImportError, match=r"needs jax-triton.*install qmoe-jax\[cuda\]"):
        calls()[name][0]()


@pytest.mark.parametrize(("jax_version", "own", "sound"), VERSIONS)
def test_versions_that_do_not_run_together_are_named(jax_version, own, sound, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", types.SimpleNamespace(__version__=own))
    monkeypatch.setattr(jax, "__version_info__", jax_version)
    if sound:
        assert triton_launch.library().__version__ == own
        return
    with pytest.raises(ImportError, match=rf"jax-triton {own} does not run under JAX"):
        triton_launch.library()


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["sub1_matmul", "sub1_decode", "grouped_matmul", "gptq_block"])
def test_lowers_for_cuda(name, capability):
    """jax-triton compiles while JAX lowers; it wants jaxlib's CUDA plugin, but no GPU."""
    try:
        triton_launch.library()
    except ImportError as error:
        pytest.skip(str(error))
    plan = calls()[name][1]()
    traced = jax.jit(lambda: triton_launch.launch(plan, capability=capability)).trace()
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "triton_kernel_call" in text
    assert traced.out_info.shape == plan.output.shape
