# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul, token_tiles
from pallas_kernels.device import grouped_matmul_pallas

# Columns, rows, tokens of each expert, tokens of none.
CASES = [
    (1, 1, (1,), 0),
    (64, 64, (64,), 0),
    (129, 70, (3, 0, 100, 1), 5),
    (96, 200, (0, 0, 17), 0),
    (40, 33, (0, 0), 9),
]


def inputs(case, dtype):
    columns, rows, sizes, rest = case
    generator = np.random.default_rng(0)
    tokens = sum(sizes) + rest
    x = jnp.asarray(generator.standard_normal((tokens, columns)), dtype)
    weights = jnp.asarray(generator.standard_normal((len(sizes), rows, columns)), dtype)
    expected = np.zeros((tokens, rows))
    for token, expert in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        expected[token] = np.asarray(weights[expert], float) @ np.asarray(x[token], float)
    return x, weights, jnp.asarray(sizes, jnp.int32), expected


def assert_close(found, expected, dtype):
    assert found.dtype == dtype
    scale = np.abs(expected).max(initial=1)
    tolerance = scale * (1e-6 if dtype == jnp.float32 else 2**-8)
    np.testing.assert_allclose(np.asarray(found, float), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_every_shape(case, dtype):
    x, weights, sizes, expected = inputs(case, dtype)
    by_xla = grouped_matmul.grouped_matmul(x, weights, sizes, implementation="xla")
    assert_close(by_xla, expected, dtype)
    tiles = token_tiles.token_tiles(sizes, len(x), 16)
    by_pallas = grouped_matmul_pallas.grouped_matmul(x, weights, tiles, 16, interpret=True)
    assert_close(by_pallas, expected, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["pallas", "triton"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", [*CASES, (768, 3072, (100, 0, 300, 1), 3)])
def test_every_shape_on_the_device(case, dtype, implementation):
    x, weights, sizes, expected = inputs(case, dtype)
    found = grouped_matmul.grouped_matmul(x, weights, sizes, implementation=implementation)
    assert_close(found, expected, dtype)


def test_no_tokens_at_all():
    x, weights, sizes, _ = inputs((4, 3, (0, 0), 0), jnp.float32)
    found = grouped_matmul.grouped_matmul(x, weights, sizes, implementation="pallas")
    assert found.shape == (0, 3)


def test_arguments_that_do_not_fit():
    x, weights, sizes, _ = inputs(CASES[1], jnp.float32)
    with pytest.raises(ValueError, match=r"got bfloat16 \(64, 64\)"):
        grouped_matmul.grouped_matmul(x.astype(jnp.bfloat16), weights, sizes)
