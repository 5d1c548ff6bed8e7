# SPDX-License-Identifier: Apache-2.0
"""The experts against a loop over tokens, and the joint through which they are called."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_switch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from qmoe_jax.models import moe
from qmoe_jax.models.config import SwitchConfig

D, F = 4, 6
CONFIG = SwitchConfig(
    vocab_size=11,
    emb_dim=D,
    num_heads=1,
    head_dim=4,
    mlp_dim=F,
    expert_mlp_dim=F,
    num_encoder_layers=1,
    num_decoder_layers=1,
    encoder_sparse_layers=(0,),
    decoder_sparse_layers=(0,),
    num_experts=3,
    min_expert_capacity=1,
    eval_capacity_factor=1.0,
)
RELU, GATED = ("relu",), ("gelu", "linear")


def random_experts(rng, num_experts, activations=RELU, width=F):
    def kernel(rows, columns):
        return {
            "kernel": jnp.asarray(rng.standard_normal((num_experts, rows, columns), np.float32))
        }

    inputs = ("wi",) if activations == RELU else ("wi_0", "wi_1")
    return {"params": {name: kernel(D, width) for name in inputs} | {"wo": kernel(width, D)}}


def one_by_one(variables, x, expert_index, activations=RELU):
    """Differentiable reference: each token through a gathered copy of its expert."""
    weights = {name: leaf["kernel"] for name, leaf in variables["params"].items()}
    num_experts = weights["wo"].shape[0]
    own = {name: leaf[jnp.minimum(expert_index, num_experts - 1)] for name, leaf in weights.items()}
    if activations == RELU:
        hidden = jax.nn.relu(jnp.einsum("nd,ndf->nf", x, own["wi"]))
    else:
        gate = jax.nn.gelu(jnp.einsum("nd,ndf->nf", x, own["wi_0"]))
        hidden = gate * jnp.einsum("nd,ndf->nf", x, own["wi_1"])
    y = jnp.einsum("nf,nfd->nd", hidden, own["wo"])
    return jnp.where((expert_index < num_experts)[:, None], y, 0)


LOADS = {
    "one token": (3, [1]),
    "no expert has tokens": (2, [2, 2, 2]),
    "all tokens to the last": (4, [3] * 300),
    "one expert": (1, [0, 1, 0, 0]),
    "an expert without tokens": (3, [2, 0, 3, 2, 0, 0, 2]),
    "more experts than tokens": (50, [49, 0, 50, 7, 7]),
    "full tiles and one row more": (2, [0] * 128 + [1] * 129),
}


@pytest.mark.parametrize("activations", [RELU, GATED])
@pytest.mark.parametrize("load", LOADS)
def test_dense_experts_and_their_gradients(load, activations):
    num_experts, index = LOADS[load]
    rng = np.random.default_rng(0)
    variables = random_experts(rng, num_experts, activations)
    x, dy = (jnp.asarray(rng.standard_normal((len(index), D), np.float32)) for _ in range(2))
    index = jnp.asarray(index)

    @tiny_switch.quick_jit
    def both(variables, x, dy):
        y, pull_back = jax.vjp(
            lambda variables, x: moe.dense_experts(variables, x, index, activations=activations),
            variables,
            x,
        )
        wanted, pull_back_wanted = jax.vjp(
            lambda variables, x: one_by_one(variables, x, index, activations), variables, x
        )
        return (y, pull_back(dy)), (wanted, pull_back_wanted(dy))

    got, wanted = both(variables, x, dy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, wanted)


jitted_dense_experts = tiny_switch.quick_jit(moe.dense_experts)
jitted_one_by_one = tiny_switch.quick_jit(one_by_one)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=64, max_size=64))
def test_dense_experts_for_any_loads(index):
    variables = random_experts(np.random.default_rng(0), 5)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((64, D), np.float32))
    index = jnp.asarray(index)
    np.testing.assert_allclose(
        jitted_dense_experts(variables, x, index),
        jitted_one_by_one(variables, x, index),
        rtol=1e-4,
        atol=1e-4,
    )


def test_no_tokens():
    variables = random_experts(np.random.default_rng(0), 3)
    y = moe.dense_experts(variables, jnp.zeros((0, D)), jnp.zeros(0, jnp.int32))
    assert y.shape == (0, D)


def test_experts_compute_in_the_dtype_of_the_tokens():
    variables = random_experts(np.random.default_rng(0), 3)
    index = jnp.asarray([0, 1, 2, 3])
    y = moe.dense_experts(variables, jnp.ones((4, D), jnp.bfloat16), index)
    wanted = moe.dense_experts(variables, jnp.ones((4, D)), index)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), wanted, rtol=0.03, atol=0.03)


def shapes_within(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from shapes_within(inner)


def test_memory_is_that_of_the_tokens_and_one_tile():
    """Nothing of tokens times experts, no copy of the stack, hidden units of one tile only."""
    num_experts, tokens, width = 64, 512, 32
    variables = random_experts(np.random.default_rng(0), num_experts, width=width)
    x, index = jnp.zeros((tokens, D)), jnp.zeros(tokens, jnp.int32)
    traced = jax.make_jaxpr(moe.dense_experts)(variables, x, index).jaxpr
    largest = max(np.prod(shape) for shape in shapes_within(traced))
    assert largest <= 2 * tokens * D + 64 * 8 * D < num_experts * D * width


def test_hidden_units_can_be_dropped_per_expert():
    rng = np.random.default_rng(0)
    variables = random_experts(rng, 3)
    x, index = jnp.asarray(rng.standard_normal((5, D), np.float32)), jnp.asarray([0, 1, 2, 1, 3])
    scale = jnp.asarray(rng.random((3, F), np.float32))
    got = moe.dense_experts({**variables, "dropout": {"hidden_scale": scale}}, x, index)
    folded_wo = {"kernel": variables["params"]["wo"]["kernel"] * scale[:, :, None]}
    folded = {"params": variables["params"] | {"wo": folded_wo}}
    np.testing.assert_allclose(got, moe.dense_experts(folded, x, index), rtol=1e-4, atol=1e-5)


def test_missing_experts_are_named():
    with pytest.raises(ValueError, match="parameters of `mlp/expert` are missing"):
        moe.dense_experts({"packed": {}}, jnp.zeros((1, D)), jnp.zeros(1, jnp.int32))


@pytest.fixture
def layer():
    """A module, its variables, and inputs whose last token is padding."""
    rng = np.random.default_rng(0)
    valid = jnp.asarray([[True, True, True], [True, True, False]])
    x = jnp.asarray(rng.standard_normal((2, 3, D), np.float32)).at[1, 2].set(0)
    module = moe.MoeMlp(CONFIG)
    variables = tiny_switch.quick_jit(module.init)(jax.random.key(0), x, valid)
    variables["params"]["router"]["router_weights"]["w"]["kernel"] *= 100
    return module, variables, x, valid


def test_output_is_probability_times_expert(layer):
    module, variables, x, valid = layer
    index, prob = module.apply(variables, x, valid, method="route")
    router = variables["params"]["router"]["router_weights"]["w"]["kernel"]
    all_prob = np.asarray(jax.nn.softmax(x @ router, axis=-1))
    np.testing.assert_array_equal(index[0], all_prob.argmax(-1)[0])
    np.testing.assert_allclose(prob, all_prob.max(-1), rtol=1e-6)
    assert index[1, 2] == 3, "padding belongs to no expert"
    experts = {"params": variables["params"]["expert"]}
    wanted = prob.reshape(-1, 1) * one_by_one(experts, x.reshape(-1, D), index.reshape(-1))
    got = module.apply(variables, x, valid)
    np.testing.assert_allclose(got.reshape(-1, D), wanted, rtol=1e-5, atol=1e-6)


def test_output_is_float32_for_bfloat16_tokens(layer):
    module, variables, x, valid = layer
    assert module.apply(variables, x.astype(jnp.bfloat16), valid).dtype == jnp.float32


def test_other_experts_read_their_own_collection(layer):
    module, variables, x, valid = layer

    def negated(variables, x, expert_index):
        assert set(variables) == {"packed"}
        return x * variables["packed"]["sign"][expert_index][:, None]

    packed = {
        "params": {"router": variables["params"]["router"]},
        "packed": {"expert": {"sign": jnp.asarray([-1.0, -1.0, -1.0, 0.0])}},
    }
    got = dataclasses.replace(module, experts=negated).apply(packed, x, valid)
    _, prob = module.apply(packed, x, valid, method="route")
    np.testing.assert_allclose(got, -prob[:, :, None] * x, rtol=1e-6)


def test_dropped_tokens_get_zero(layer):
    module, variables, x, _ = layer
    x = jnp.broadcast_to(x[:1, :1], (2, 3, D))  # six equal tokens: 3 groups of 2, capacity 1
    valid = jnp.ones((2, 3), bool)
    capped = dataclasses.replace(module, capacity="t5x")
    index, _ = capped.apply(variables, x, valid, method="route")
    chosen = int(index[0, 0])
    np.testing.assert_array_equal(index, [[chosen, 3, chosen], [3, chosen, 3]])
    got = capped.apply(variables, x, valid)
    np.testing.assert_array_equal(np.any(got, axis=-1), index == chosen)


def test_expert_dropout_spares_whole_hidden_units(layer):
    """All tokens of an expert lose the same hidden units."""
    module, variables, x, valid = layer
    config = dataclasses.replace(CONFIG, expert_dropout_rate=0.5)
    module = dataclasses.replace(module, config=config)
    x, valid = jnp.broadcast_to(x[:1, :1], (2, 3, D)), jnp.ones((2, 3), bool)
    rngs = {"dropout": jax.random.key(3)}
    dropped = module.apply(variables, x, valid, enable_dropout=True, rngs=rngs)
    np.testing.assert_allclose(dropped, np.broadcast_to(dropped[:1, :1], dropped.shape), rtol=1e-6)
    assert not np.allclose(dropped, module.apply(variables, x, valid))
