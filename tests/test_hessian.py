# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qmoe_jax.quantization import hessian


def lower(tokens, experts=1, expert=0):
    """One expert's Hessian after the given tiles, its lower triangle."""
    H_ECC = hessian.zeros(experts, tokens[0].shape[1])
    for tile in tokens:
        strips = hessian.add_tile(hessian.strips(H_ECC, jnp.int32(expert)), jnp.array(tile))
        H_ECC = hessian.with_strips(H_ECC, strips, jnp.int32(expert))
    return np.tril(H_ECC)


@pytest.mark.parametrize("columns", [1, 3, 64, 98])
def test_sum_of_tiles_is_the_gram_matrix_of_that_expert_alone(columns):
    tokens = np.random.default_rng(columns).normal(size=(2, 40, columns)).astype(np.float32)
    flat = tokens.reshape(80, columns).astype(np.float64)
    expected = np.zeros((3, columns, columns))
    expected[2] = np.tril(flat.T @ flat)
    np.testing.assert_allclose(lower(tokens, 3, 2), expected, rtol=1e-5, atol=1e-5)


def test_zero_rows_add_nothing():
    tokens = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    padded = np.concatenate([tokens[:40], np.zeros_like(tokens[40:])])
    expected = np.tril(tokens[:40].T @ tokens[:40])
    np.testing.assert_allclose(lower([padded])[0], expected, rtol=1e-5, atol=1e-5)


def test_proportional_to_the_published_codes_hessian(data_dir):
    golden = np.load(data_dir / "qmoe" / "gptq.npz")
    ours = lower([golden["hess/x2"]])[0]
    published = np.tril(golden["hess/H2"])
    scale = np.trace(published) / np.trace(ours)
    np.testing.assert_allclose(
        ours * scale, published, rtol=1e-4, atol=1e-6 * np.abs(published).max()
    )


def test_products_ask_for_full_float32():
    strips = hessian.strips(hessian.zeros(1, 8), jnp.int32(0))
    text = str(jax.make_jaxpr(hessian.add_tile)(strips, jnp.zeros((4, 8))))
    assert text.count("dot_general") == text.count("Precision.HIGHEST") // 2 > 0
