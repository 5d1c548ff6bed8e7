# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from pallas_kernels import grid_levels
from qmoe_jax.quantization import gptq, grids

GPTQ_CASES = [
    (case, bits, group, order)
    for case in "AB"
    for bits in ("ternary", 2)
    for group in (None, 32)
    for order in (False, True)
]


@pytest.fixture(scope="module")
def goldens(data_dir):
    return np.load(data_dir / "qmoe" / "gptq.npz")


def solve(weights, hessian, bits, **options):
    """Rows-first weights in, rows-first dequantized weights out."""
    return gptq.gptq(
        jnp.array(weights).mT,
        jnp.array(hessian),
        bits=bits,
        options=gptq.GptqOptions(**options),
        store_bfloat16=False,
    )


def assert_same_levels(result, expected):
    """Equal up to the rounding of one product, far less than a level."""
    actual = np.asarray(result.kernel.mT)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def correlated(seed, experts, rows, columns, tokens):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(experts, rows, columns)).astype(np.float32)
    mix = rng.normal(size=(columns, columns)) / np.sqrt(columns)
    X = (rng.normal(size=(experts, tokens, columns)) @ mix).astype(np.float32)
    return weights, np.einsum("enc,end->ecd", X, X)


@pytest.mark.parametrize(("case", "bits", "group", "order"), GPTQ_CASES)
def test_levels_of_the_published_code(goldens, case, bits, group, order):
    name = f"{case}/w{1.5 if bits == 'ternary' else bits}_g{group or -1}_a{int(order)}/Q"
    result = solve(
        goldens[f"{case}/W"],
        goldens[f"{case}/H"],
        bits,
        group_size=group,
        activation_order=order,
    )
    assert_same_levels(result, goldens[name])
    assert not result.not_pd.any()


@pytest.mark.parametrize("bits", ["ternary", 2])
def test_no_tokens_is_round_to_nearest_for_that_expert_alone(goldens, bits):
    W, H = goldens["A/W"], goldens["A/H"].copy()
    H[1] = 0
    result = solve(W, H, bits)
    nearest = gptq.round_to_nearest(jnp.array(W).mT, bits=bits, store_bfloat16=False)
    np.testing.assert_array_equal(result.levels[1], nearest.levels[1])
    name = {"ternary": "1.5", 2: "2"}[bits]
    assert_same_levels(result, goldens[f"zeroH/Q_w{name}"])
    assert_same_levels(nearest, goldens[f"A/rtn_w{name}"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a0", {}),
        ("a1", {"activation_order": True}),
        ("g32", {"group_size": 32}),
    ],
)
def test_a_hessian_that_is_not_positive_definite_rounds_that_expert_alone(goldens, name, options):
    result = solve(goldens["A/W"], goldens["nonPD/H"], "ternary", **options)
    assert_same_levels(result, goldens[f"nonPD/Q_w1.5_{name}"])
    assert 0 < int(result.not_pd.sum()) < len(result.not_pd)


@pytest.mark.parametrize("bits", ["ternary", 2])
def test_degenerate_rows(goldens, bits):
    result = solve(goldens["degenerate_rows/W"], goldens["A/H"], bits)
    name = {"ternary": "1.5", 2: "2"}[bits]
    assert_same_levels(result, goldens[f"degenerate_rows/Q_w{name}"])


@pytest.mark.parametrize("bits", ["ternary", 2])
def test_bfloat16_weights(goldens, bits):
    result = solve(goldens["bf16/W"], goldens["A/H"], bits)
    name = {"ternary": "1.5", 2: "2"}[bits]
    kernel = result.kernel.astype(jnp.bfloat16).astype(jnp.float32)  # as the published code casts
    np.testing.assert_array_equal(kernel.mT, goldens[f"bf16/Q_w{name}"])


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("options", [{}, {"group_size": 256}, {"group_size": 64}])
def test_agrees_with_the_float64_oracle(bits, options):
    weights, hessian = correlated(0, 2, 24, 300, 500)
    result = solve(weights, hessian, bits, **options)
    for e in range(2):
        expected = oracles.gptq(weights[e], hessian[e], bits, **options)
        differ = np.abs(np.asarray(result.kernel[e].T) - expected) > 1e-3
        assert differ.mean() < 1e-3


def test_error_is_the_relative_layer_error_and_beats_rounding():
    weights, hessian = correlated(1, 3, 40, 96, 300)
    result = solve(weights, hessian, "ternary")
    nearest = gptq.round_to_nearest(jnp.array(weights).mT, bits="ternary", store_bfloat16=False)
    for e in range(3):
        damped = hessian[e] + 0.1 * np.mean(np.diag(hessian[e])) * np.eye(96)
        solved, rounded = (
            oracles.layer_error(weights[e], np.asarray(r.kernel[e].T), damped)
            for r in (result, nearest)
        )
        whole = oracles.layer_error(weights[e], np.zeros_like(weights[e]), damped)
        np.testing.assert_allclose(result.error[e], solved / whole, rtol=1e-4)
        assert solved < rounded


def test_a_group_of_experts_is_solved_as_one_by_one():
    weights, hessian = correlated(2, 5, 48, 144, 400)
    together = solve(weights, hessian, "ternary")
    for e in range(5):
        alone = solve(weights[e : e + 1], hessian[e : e + 1], "ternary")
        np.testing.assert_array_equal(together.levels[e], alone.levels[0])


@pytest.mark.parametrize("block_size", [16, 48, 128])
def test_block_size_does_not_change_the_levels(block_size):
    weights, hessian = correlated(3, 2, 32, 200, 400)
    expected = solve(weights, hessian, 2)
    np.testing.assert_array_equal(
        solve(weights, hessian, 2, block_size=block_size).levels, expected.levels
    )


@pytest.mark.parametrize("bits", grids.BITS)
@pytest.mark.parametrize("group_size", [None, 32])
def test_levels_and_grid_give_the_kernel(bits, group_size):
    weights, hessian = correlated(4, 2, 8, 70, 100)
    result = gptq.gptq(
        jnp.array(weights, jnp.bfloat16).mT,
        jnp.array(hessian, jnp.float32),
        bits=bits,
        options=gptq.GptqOptions(group_size=group_size),
    )
    grid = np.repeat(np.asarray(result.grid), group_size or 70, axis=3)[..., :70]
    values = grid_levels.dequantize(result.levels, jnp.array(grid), bits)
    np.testing.assert_array_equal(values, result.kernel.mT)
    np.testing.assert_array_equal(grid, grid.astype(jnp.bfloat16).astype(np.float32))


def test_every_product_asks_for_full_float32():
    jaxpr = jax.make_jaxpr(lambda w, h: gptq.gptq(w, h, bits="ternary"))(
        jnp.zeros((1, 300, 8)), jnp.zeros((1, 300, 300))
    )
    products = str(jaxpr).split("dot_general[")[1:]
    assert products
    assert all("HIGHEST" in product.split("\n  ]")[0][:400] for product in products)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 48}, "GROUP_SIZE is 48"),
        ({"block_size": 20}, "BLOCK_SIZE is 20"),
        ({"damping": -1.0}, "DAMPING is -1"),
        ({"damping": float("nan")}, "DAMPING is nan"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        gptq.GptqOptions(**options)
