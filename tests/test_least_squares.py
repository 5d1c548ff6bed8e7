# SPDX-License-Identifier: Apache-2.0
"""Ternary values and weights that make the layer's error least, against float64 NumPy."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from qmoe_jax.codec import rates
from qmoe_jax.quantization import columns, gptq, least_squares
from qmoe_jax.quantization.columns import Ternary
from qmoe_jax.quantization.gptq import GptqOptions

OPTIONS = GptqOptions(grid="least_squares")


def layer(E=2, C=40, R=24, seed=0):
    """Weights [E, C, R] and correlated Hessians."""
    rng = np.random.default_rng(seed)
    mix = np.eye(C) + 0.5 * rng.standard_normal((E, C, C)) / np.sqrt(C)
    tokens = rng.standard_normal((E, 3 * C, C)) @ mix
    kernel = rng.standard_normal((E, C, R)).astype(np.float32)
    return jnp.asarray(kernel), jnp.asarray(tokens.swapaxes(1, 2) @ tokens, jnp.float32)


def damped(hessian, damping=0.1):
    H = np.asarray(hessian, np.float64)
    mean = np.diagonal(H, axis1=1, axis2=2).mean(1)
    return H + damping * mean[:, None, None] * np.eye(H.shape[1])


def errors(kernel, hessian, found):
    """Of each row, [E, R]."""
    D = np.asarray(kernel, np.float64) - np.asarray(found.kernel, np.float64)
    return np.einsum("ecr,ecd,edr->er", D, damped(hessian), D)


def entropy(found):
    return rates.entropy(np.bincount(np.asarray(found.levels).reshape(-1), minlength=3))


def test_values_are_the_least_squares_solution():
    kernel, hessian = layer()
    levels = np.random.default_rng(1).integers(0, 3, kernel.shape).astype(np.uint8)
    levels[0, :, 0] = 0  # a row of zeros
    levels[0, :, 1] = np.where(levels[0, :, 1] == 2, 0, levels[0, :, 1])  # no weight above 0
    before = np.stack([np.full((2, 24), -9.0), np.full((2, 24), 9.0)]).astype(np.float32)
    H = damped(hessian)
    HW = jnp.asarray(H @ np.asarray(kernel, np.float64), jnp.float32)
    found = least_squares.fit_values(
        jnp.asarray(levels), jnp.asarray(H, jnp.float32), HW, jnp.asarray(before)
    )
    for e in range(2):
        root = np.linalg.cholesky(H[e]).T
        for r in range(24):
            sides = np.stack([levels[e, :, r] == 1, levels[e, :, r] == 2], 1).astype(np.float64)
            (low, high), *_ = np.linalg.lstsq(root @ sides, root @ kernel[e, :, r], rcond=None)
            expected = low if low < 0 else -9.0, high if high > 0 else 9.0
            np.testing.assert_allclose(found[:, e, r], expected, rtol=2e-3, atol=2e-4)
    assert found[0, 0, 0] == -9
    assert found[1, 0, 0] == 9
    assert found[1, 0, 1] == 9


def test_revisited_columns_are_each_the_best_choice():
    """One sweep of coordinate descent, in float64 column by column."""
    kernel, hessian = layer(E=1, C=16, R=8)
    H, W = damped(hessian)[0], np.asarray(kernel[0], np.float64)
    values = np.stack([W.min(0), W.max(0)]) * 0.7
    D = W - np.where(values[1] / 2 < W, values[1], np.where(values[0] / 2 > W, values[0], 0))
    cost = 0.4 * np.arange(8)
    expected = D.copy()
    for j in range(16):
        choices = np.stack([np.zeros(8), *values])
        trial = np.repeat(expected[None], 3, 0)
        trial[:, j] = W[j] - choices
        error = np.einsum("xcr,cd,xdr->xr", trial, H, trial) + cost * (choices != 0)
        expected[j] = W[j] - np.take_along_axis(choices, error.argmin(0)[None], 0)[0]
    grid = Ternary(
        values=jnp.asarray(values[:, None], jnp.float32),
        thresholds=jnp.asarray(values[:, None] / 2, jnp.float32),
        penalty=jnp.asarray((cost / (2 * values))[:, None], jnp.float32),
        weight=jnp.asarray(np.diagonal(H)[None], jnp.float32),
    )
    target = W + np.triu(H, 1) @ D / np.diagonal(H)[:, None]
    found, _ = columns.solve(
        jnp.asarray(target[None], jnp.float32),
        kernel,
        jnp.asarray(H[None], jnp.float32),
        "ternary",
        8,
        ternary=grid,
    )
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_the_error_is_less_with_every_sweep():
    kernel, hessian = layer(C=72, R=48)
    solved = [
        gptq.gptq(kernel, hessian, bits="ternary", options=options, store_bfloat16=False)
        for options in (GptqOptions(), *(dataclasses.replace(OPTIONS, sweeps=n) for n in range(4)))
    ]
    found = [float(errors(kernel, hessian, one).sum()) for one in solved]
    assert found[1] < found[0]
    assert found[2] < 0.9 * found[1]
    assert found[3] < 0.95 * found[2]
    for one in solved:
        np.testing.assert_allclose(
            one.error,
            errors(kernel, hessian, one).sum(1)
            / np.einsum("ecr,ecd,edr->e", kernel, damped(hessian), kernel),
            rtol=1e-3,
        )


def test_a_larger_penalty_takes_fewer_bits():
    kernel, hessian = layer(C=72, R=48)
    solved = [
        gptq.gptq(
            kernel, hessian, bits="ternary", options=dataclasses.replace(OPTIONS, penalty=penalty)
        )
        for penalty in (0.0, 0.1, 0.3, 1.0)
    ]
    bits = [entropy(one) for one in solved]
    assert all(more > less + 0.05 for more, less in itertools.pairwise(bits))
    error = [float(jnp.mean(one.error)) for one in solved]
    assert error == sorted(error)


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("store_bfloat16", [False, True])
def test_levels_and_values_are_the_kernel(store_bfloat16, activation_order):
    kernel, hessian = layer()
    options = dataclasses.replace(OPTIONS, activation_order=activation_order, penalty=0.05)
    found = gptq.gptq(
        kernel, hessian, bits="ternary", options=options, store_bfloat16=store_bfloat16
    )
    assert found.grid.shape == (2, 2, 24, 1)
    low, high = np.asarray(found.grid[..., 0])
    assert (low < 0).all() and (high > 0).all()
    levels = np.asarray(found.levels).swapaxes(1, 2)
    expected = np.choose(levels, [np.zeros_like(low)[:, None], low[:, None], high[:, None]])
    np.testing.assert_array_equal(found.kernel, expected)
    rounded = found.grid.astype(jnp.bfloat16).astype(jnp.float32)
    assert (np.asarray(rounded == found.grid).all()) == store_bfloat16


@pytest.mark.parametrize("columns_solved", [16, 128])
def test_blocks_change_nothing(columns_solved):
    kernel, hessian = layer(C=136, R=16)
    found, other = (
        gptq.gptq(
            kernel,
            hessian,
            bits="ternary",
            options=dataclasses.replace(OPTIONS, block_size=block),
        )
        for block in (columns_solved, 64)
    )
    assert np.mean(np.asarray(found.levels) == np.asarray(other.levels)) > 0.999


def test_outputs_keep_their_size():
    """As far as that is not noise made louder."""
    kernel, hessian = layer(C=72, R=48)
    H = damped(hessian)
    energy = np.einsum("ecr,ecd,edr->e", kernel, H, kernel)
    for penalty in (0.0, 1.0):
        options = dataclasses.replace(OPTIONS, penalty=penalty, sweeps=5)
        found = gptq.gptq(kernel, hessian, bits="ternary", options=options, store_bfloat16=False)
        Q = np.asarray(found.kernel, np.float64)
        inner = np.einsum("ecr,ecd,edr->e", kernel, H, Q)
        if penalty:
            assert (inner < 0.9 * energy).all()
        else:
            np.testing.assert_allclose(inner, energy, rtol=1e-4)


def test_experts_without_a_hessian_have_the_nearest_weights():
    """None at all, and one that is not positive definite."""
    kernel, _ = layer(E=2)
    hessian = jnp.stack([jnp.zeros((40, 40)), -jnp.eye(40)])
    found = gptq.gptq(kernel, hessian, bits="ternary", options=OPTIONS)
    assert np.asarray(found.not_pd).tolist() == [False, True]
    low, high = np.asarray(found.grid)[..., 0]
    W = np.asarray(kernel)
    plain = gptq.round_to_nearest(kernel, bits="ternary")
    distance = [np.sum((W - np.asarray(one.kernel)) ** 2, (1, 2)) for one in (found, plain)]
    assert (distance[0] < 0.9 * distance[1]).all()
    assert np.isfinite(low).all() and np.isfinite(high).all()


@pytest.mark.parametrize("kind", ["zeros", "one sign", "one column"])
def test_odd_rows(kind):
    kernel, hessian = layer()
    W = np.array(kernel)
    if kind == "zeros":
        W[0, :, 3] = 0
    elif kind == "one sign":
        W[0, :, 3] = np.abs(W[0, :, 3])
    else:
        W[0, 1:, 3] = 0
    for penalty in (0.0, 0.5):
        options = dataclasses.replace(OPTIONS, penalty=penalty)
        found = gptq.gptq(jnp.asarray(W), hessian, bits="ternary", options=options)
        assert np.isfinite(found.kernel).all()
        assert np.isfinite(found.grid).all()
        if kind == "zeros":
            assert not np.any(found.kernel[0, :, 3])
        if kind == "one sign":
            assert (np.asarray(found.kernel[0, :, 3]) >= 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalty": 0.1}, "LAMBDA 0.1 is for GRID 'least_squares'"),
        ({"grid": "least_squares", "penalty": -1.0}, "LAMBDA is -1.0; expected"),
        ({"grid": "least_squares", "sweeps": -1}, "SWEEPS is -1; expected"),
        ({"grid": "least_squares", "group_size": 64}, "leave GROUP_SIZE out"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        GptqOptions(**settings)


def test_least_squares_are_for_ternary_weights():
    kernel, hessian = layer()
    with pytest.raises(ValueError, match="is for BITS 'ternary', not 3"):
        gptq.gptq(kernel, hessian, bits=3, options=OPTIONS)
