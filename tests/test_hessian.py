# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qmoe_jax.quantization import hessian


@pytest.mark.parametrize("columns", [1, 3, 64, 98])
def test_sum_of_chunks_is_the_gram_matrix_of_each_expert(columns):
    tokens = np.random.default_rng(columns).normal(size=(3, 2, 40, columns)).astype(np.float32)
    H_ECC = hessian.zeros(3, columns)
    for expert in (2, 0):
        for chunk in tokens[expert]:
            H_ECC = hessian.add_tokens(H_ECC, jnp.array(chunk), jnp.int32(expert))
    H_ECC = hessian.symmetric(H_ECC)
    flat = tokens.reshape(3, 80, columns).astype(np.float64)
    expected = np.einsum("enc,end->ecd", flat, flat)
    expected[1] = 0
    np.testing.assert_allclose(H_ECC, expected, rtol=1e-5, atol=1e-5)


def test_zero_rows_add_nothing():
    tokens = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    padded = np.concatenate([tokens[:40], np.zeros_like(tokens[40:])])
    short = hessian.add_tokens(hessian.zeros(1, 32), jnp.array(padded), jnp.int32(0))
    np.testing.assert_allclose(
        hessian.symmetric(short)[0], tokens[:40].T @ tokens[:40], rtol=1e-5, atol=1e-5
    )


def test_proportional_to_the_published_codes_hessian(data_dir):
    golden = np.load(data_dir / "qmoe" / "gptq.npz")
    tokens = golden["hess/x2"]
    ours = hessian.add_tokens(hessian.zeros(1, tokens.shape[1]), jnp.array(tokens), jnp.int32(0))
    ours = np.asarray(hessian.symmetric(ours)[0])
    published = golden["hess/H2"]
    scale = np.trace(published) / np.trace(ours)
    np.testing.assert_allclose(
        ours * scale, published, rtol=1e-4, atol=1e-6 * np.abs(published).max()
    )


def test_products_ask_for_full_float32():
    text = str(
        jax.make_jaxpr(hessian.add_tokens)(jnp.zeros((1, 8, 8)), jnp.zeros((4, 8)), jnp.int32(0))
    )
    assert text.count("dot_general") == text.count("Precision.HIGHEST") // 2 > 0
