# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_switch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qmoe_jax.calibration import buffers, experts
from qmoe_jax.calibration.walk import Routes
from qmoe_jax.models.block import make_block

FLOAT32 = np.dtype(np.float32)


@given(expert=hnp.arrays(np.int32, st.integers(1, 60), elements=st.integers(0, 5)))
@settings(max_examples=50, deadline=None)
def test_every_routed_token_belongs_to_its_expert_in_buffer_order(expert):
    """Index 5 is one past the last expert: a dropped token."""
    routes = Routes(expert, np.ones(len(expert), np.float32))
    assigned = experts.assign(routes, 5)
    for e in range(5):
        np.testing.assert_array_equal(assigned.of(e), np.flatnonzero(expert == e))


def test_positions_not_kept_belong_to_no_expert_and_the_cap_counts_the_kept():
    routes = Routes(np.array([0, 1, 0, 1, 1, 0], np.int32), np.ones(6, np.float32))
    keep = np.array([True, True, False, True, False, True])
    assigned = experts.assign(routes, 2, keep)
    np.testing.assert_array_equal(assigned.of(0), [0, 5])
    np.testing.assert_array_equal(assigned.of(1), [1, 3])
    assert experts.token_cap(len(assigned.rows), 2, 1.5) == 3


def sparse_block(name):
    config = tiny_switch.config(name)
    layer = config.encoder_sparse_layers[0]
    params = tiny_switch.params(name)["encoder"][f"layers_{layer}"]
    return make_block(config, "encoder", layer, FLOAT32), params


def normed(rows, params):
    rows = rows.astype(np.float64)
    scale = np.asarray(params["pre_mlp_layer_norm"]["scale"], np.float64)
    return rows / np.sqrt((rows**2).mean(1, keepdims=True) + 1e-6) * scale


def hidden(x, kernels):
    if "wi" in kernels:
        return np.maximum(x @ kernels["wi"], 0)
    a = x @ kernels["wi_0"]
    gelu = 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
    return gelu * (x @ kernels["wi_1"])


@pytest.mark.parametrize("tokens", [0, 1, 128, 700])  # none, one small tile, two tiles
@pytest.mark.parametrize("name", ["tiny_switch_base", "tiny_switch_xxl"])
def test_hessians_and_outputs_against_float64(name, tokens):
    block, params = sparse_block(name)
    expert = 3
    stacked = {m: leaf["kernel"] for m, leaf in params["mlp"]["expert"].items()}
    kernels = experts.expert_kernels(stacked, expert)
    wide = {m: np.asarray(k, np.float64) for m, k in kernels.items()}
    rng = np.random.default_rng(tokens)
    data = rng.normal(size=(750, block.config.emb_dim)).astype(np.float32)
    buffer = buffers.TokenBuffer(data.copy(), np.array([0, 750]))
    rows = np.sort(rng.choice(750, tokens, replace=False))
    x = normed(data[rows], params)
    h = hidden(x, wide)

    hessians = experts.zero_hessians(block.config, 2)
    hessians = experts.add_to_hessians(hessians, 1, block, params, kernels, buffer, rows)
    for kind, inputs in (("in", x), ("out", h)):
        lower = np.tril(np.asarray(hessians[kind][1]))
        np.testing.assert_allclose(lower, np.tril(inputs.T @ inputs), rtol=2e-4, atol=2e-3)
        assert not np.asarray(hessians[kind][0]).any()

    prob = rng.uniform(size=750).astype(np.float32)
    chosen = np.full(750, block.config.num_experts, np.int32)
    chosen[rows] = expert
    routes = Routes(chosen, prob)
    assigned = experts.assign(routes, block.config.num_experts)
    group = {name: kernel[2:5] for name, kernel in stacked.items()}
    experts.run_experts(block, params, group, 2, buffer, routes, assigned)
    expected = data.astype(np.float64)
    expected[rows] += prob[rows, None] * (h @ wide["wo"])
    np.testing.assert_allclose(buffer.data, expected, rtol=1e-4, atol=1e-4)


def test_only_the_hessians_asked_for_are_computed():
    block, params = sparse_block("tiny_switch_base")
    stacked = {m: leaf["kernel"] for m, leaf in params["mlp"]["expert"].items()}
    buffer = buffers.TokenBuffer(np.ones((4, 64), np.float32), np.array([0, 4]))
    only_in = {"in": experts.zero_hessians(block.config, 1)["in"]}
    kernels = experts.expert_kernels(stacked, 0)
    found = experts.add_to_hessians(only_in, 0, block, params, kernels, buffer, np.arange(4))
    assert set(found) == {"in"}


def test_an_expert_gets_the_same_bits_in_any_group():
    block, params = sparse_block("tiny_switch_base")
    rng = np.random.default_rng(0)
    buffer = buffers.TokenBuffer(rng.normal(size=(300, 64)).astype(np.float32), np.array([0, 300]))
    stacked = {m: leaf["kernel"] for m, leaf in params["mlp"]["expert"].items()}
    kernels = experts.expert_kernels(stacked, 5)
    found = []
    for size, place in ((1, 0), (8, 5)):
        hessians = experts.zero_hessians(block.config, size)
        rows = np.arange(0, 300, 2)
        hessians = experts.add_to_hessians(hessians, place, block, params, kernels, buffer, rows)
        found.append(hessians["out"][place])
    np.testing.assert_array_equal(*found)
    assert jnp.any(found[0] != 0)
