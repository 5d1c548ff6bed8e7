# SPDX-License-Identifier: Apache-2.0
"""Norms, kernels, masks and attention, each against a few lines of NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_switch

from qmoe_jax.models import attention, layers
from qmoe_jax.models.config import SwitchConfig

CONFIG = SwitchConfig(
    vocab_size=11,
    emb_dim=6,
    num_heads=2,
    head_dim=4,
    mlp_dim=10,
    expert_mlp_dim=10,
    num_encoder_layers=1,
    num_decoder_layers=1,
    encoder_sparse_layers=(0,),
    decoder_sparse_layers=(0,),
    num_experts=4,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def random(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape, dtype=np.float32))


def test_rms_norm_does_not_centre(rng):
    x, scale = random(rng, 3, 6) + 5, random(rng, 6)
    wanted = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-6) * scale[None]
    np.testing.assert_allclose(layers.rms_norm(x, scale, jnp.float32), wanted, rtol=1e-6)


def test_rms_norm_rounds_before_the_scale(rng):
    x, scale = random(rng, 3, 6), random(rng, 6)
    normed = layers.rms_norm(x, jnp.ones(6), jnp.float32)
    wanted = normed.astype(jnp.bfloat16) * scale.astype(jnp.bfloat16)[None]
    got = layers.rms_norm(x, scale, jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.astype(jnp.float32), wanted.astype(jnp.float32))


def test_residual_keeps_the_wider_dtype():
    one = jnp.ones(3, jnp.bfloat16)
    assert layers.add_residual(one, one).dtype == jnp.bfloat16
    small = jnp.full(3, 2.0**-12)
    np.testing.assert_array_equal(layers.add_residual(one, small), np.full(3, 1 + 2.0**-12))


def test_activations(rng):
    a, b = random(rng, 5), random(rng, 5)
    tanh = np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))
    np.testing.assert_array_equal(layers.activate(("relu",), [a]), np.maximum(a, 0))
    got = layers.activate(("gelu", "linear"), [a, b])
    np.testing.assert_allclose(got, 0.5 * a * (1 + tanh) * b, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"'swish'; known are relu, gelu, linear"):
        layers.activate(("swish",), [a])


def test_embedding_and_logits(rng):
    table, x = random(rng, 11, 4), random(rng, 1, 2, 4)
    tokens = jnp.asarray([[3, 0, 12]])
    embedded = layers.embed_tokens(table, tokens, jnp.bfloat16)
    np.testing.assert_array_equal(embedded[0, :2], table[jnp.asarray([3, 0])].astype(jnp.bfloat16))
    assert np.isnan(embedded[0, 2].astype(jnp.float32)).all(), "outside the vocabulary"
    np.testing.assert_allclose(layers.tied_logits(table, x), x @ table.T / 2, rtol=1e-6)
    np.testing.assert_allclose(layers.untied_logits(table.T, x), x @ table.T, rtol=1e-6)
    assert layers.untied_logits(table.T, x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_mlp_drops_the_same_hidden_units_at_all_positions():
    mlp = layers.Mlp(64, ("relu",), 0.5, jnp.float32)
    x = jnp.ones((2, 3, 6))
    variables = tiny_switch.quick_jit(mlp.init)(jax.random.key(0), x)
    apply = tiny_switch.quick_jit(mlp.apply, static_argnames="enable_dropout")
    plain = apply(variables, x)
    dropped = apply(variables, x, enable_dropout=True, rngs={"dropout": jax.random.key(1)})
    np.testing.assert_allclose(dropped - dropped[:, :1], np.zeros_like(dropped), atol=1e-6)
    assert not np.allclose(dropped, plain)
    assert not np.allclose(dropped[0], dropped[1]), "each example has a mask of its own"


FIRST_DISTANCES = {  # T5X: the first distance of each bucket beyond the exact ones
    True: {8: 24, 12: 25, 16: 26, 23: 27, 32: 28, 46: 29, 64: 30, 91: 31},
    False: {16: 16, 19: 17, 21: 18, 24: 19, 27: 20, 31: 21, 35: 22, 40: 23, 46: 24, 52: 25, 59: 26}
    | {67: 27, 77: 28, 87: 29, 99: 30, 113: 31},
}


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_position_buckets(bidirectional):
    sign = 1 if bidirectional else -1  # the decoder looks back
    distances = np.arange(4097)
    got = attention.relpos_buckets(
        jnp.zeros(1, jnp.int32),
        jnp.asarray(sign * distances),
        bidirectional=bidirectional,
        num_buckets=32,
        max_distance=128,
    )[0]
    first = FIRST_DISTANCES[bidirectional]
    exact = min(first)
    wanted = np.arange(4097) + (16 if bidirectional else 0)
    wanted[0] = 0
    for distance, bucket in first.items():
        wanted[distance:] = bucket
    assert exact == (8 if bidirectional else 16)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_of_the_other_direction(bidirectional):
    keys = jnp.asarray([0, -3, -200]) if bidirectional else jnp.asarray([0, 1, 200])
    got = attention.relpos_buckets(
        jnp.zeros(1, jnp.int32),
        keys,
        bidirectional=bidirectional,
        num_buckets=32,
        max_distance=128,
    )
    np.testing.assert_array_equal(got[0], [0, 3, 15] if bidirectional else [0, 0, 0])


def test_position_bias_depends_on_the_distance_alone(rng):
    table, positions = random(rng, 2, 32), jnp.arange(5)
    bias = attention.position_bias(CONFIG, "encoder", table, positions, positions, jnp.float32)
    np.testing.assert_array_equal(bias[:, 1:, 1:], bias[:, :-1, :-1])
    np.testing.assert_array_equal(bias[:, 0, 1], table[:, 17])
    np.testing.assert_array_equal(bias[:, 1, 0], table[:, 1])
    later = attention.position_bias(
        CONFIG, "encoder", table, positions + 7, positions + 7, jnp.float32
    )
    np.testing.assert_array_equal(bias, later)


def test_masks():
    encoder = attention.encoder_masks(jnp.asarray([[5, 6, 0]]))
    np.testing.assert_array_equal(encoder.valid, [[1, 1, 0]])
    np.testing.assert_array_equal(encoder.attention, [[[1, 1, 0], [1, 1, 0], [0, 0, 0]]])
    assert encoder.cross is None
    inputs, targets = jnp.asarray([[0, 7, 8, 0, 0]]), jnp.asarray([[7, 8, 1, 0, 0]])
    decoder = attention.decoder_masks(inputs, targets, jnp.asarray([[5, 0]]))
    np.testing.assert_array_equal(decoder.valid, [[1, 1, 1, 0, 0]])
    causal = np.tril(np.ones((5, 5)))
    causal[3:] = 0
    np.testing.assert_array_equal(decoder.attention[0], causal)
    np.testing.assert_array_equal(decoder.cross, [[[1, 0]] * 3 + [[0, 0]] * 2])


def test_first_and_unfinished_positions_are_valid():
    """Position 0 always is; a 0 before a token is a token's start, not padding."""
    inputs = jnp.asarray([[0, 0, 0, 7], [0, 0, 0, 0]])
    masks = attention.decoder_masks(inputs, inputs, inputs)
    np.testing.assert_array_equal(masks.valid, [[1, 0, 1, 1], [1, 0, 0, 0]])


def softmax_attention(params, x, y, mask, bias):
    """One example in float64: unscaled logits, -1e10 where masked."""
    kernels = {name: np.asarray(leaf["kernel"], np.float64) for name, leaf in params.items()}
    heads = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        query, key = x @ kernels["query"][:, part], y @ kernels["key"][:, part]
        weights = np.exp(query @ key.T + np.where(mask, 0, -1e10) + bias[head])
        heads.append(weights / weights.sum(-1, keepdims=True) @ (y @ kernels["value"][:, part]))
    return np.concatenate(heads, axis=-1) @ kernels["out"]


def test_attention(rng):
    x, y = random(rng, 2, 3, 6), random(rng, 2, 5, 6)
    bias = random(rng, 2, 3, 5)
    mask = jnp.asarray(rng.random((2, 3, 5)) < 0.6).at[:, :, 0].set(True)
    module = attention.Attention(CONFIG, jnp.float32)
    variables = tiny_switch.quick_jit(module.init)(jax.random.key(0), x, y, mask, bias)
    variables = jax.tree.map(lambda leaf: leaf * 5, variables)
    got = tiny_switch.quick_jit(module.apply)(variables, x, y, mask, bias)
    for b in range(2):
        wanted = softmax_attention(variables["params"], x[b], y[b], mask[b], bias)
        np.testing.assert_allclose(got[b], wanted, rtol=1e-4, atol=1e-5)


def test_attention_dropout_is_the_same_for_all_queries(rng):
    config = dataclasses.replace(CONFIG, dropout_rate=0.5)
    x, y = jnp.broadcast_to(random(rng, 1, 1, 6), (1, 3, 6)), random(rng, 1, 5, 6)
    mask = jnp.ones((1, 3, 5), bool)
    module = attention.Attention(config, jnp.float32)
    variables = tiny_switch.quick_jit(module.init)(jax.random.key(0), x, y, mask)
    apply = tiny_switch.quick_jit(module.apply, static_argnames="enable_dropout")
    rngs = {"dropout": jax.random.key(1)}
    dropped = apply(variables, x, y, mask, enable_dropout=True, rngs=rngs)
    np.testing.assert_allclose(dropped[:, 1:], dropped[:, :-1], atol=1e-6)
    assert not np.allclose(dropped, apply(variables, x, y, mask))


def test_initial_scales():
    """A tenth of fan-in scaling; `query` also carries the division by sqrt(head_dim)."""
    config = dataclasses.replace(CONFIG, emb_dim=256, head_dim=64, num_heads=4)
    x, mask = jnp.zeros((1, 1, 256)), jnp.ones((1, 1, 1), bool)
    init = tiny_switch.quick_jit(attention.Attention(config, jnp.float32).init)
    params = init(jax.random.key(0), x, x, mask)["params"]
    std = {name: float(jnp.std(leaf["kernel"])) for name, leaf in params.items()}
    assert std["key"] == pytest.approx(math.sqrt(0.1 / 256), rel=0.02)
    assert std["query"] == pytest.approx(math.sqrt(0.1 / 256 / 64), rel=0.02)
    stacked = layers.kernel_init(stack_axes=(0,))(jax.random.key(0), (50, 64, 8), jnp.float32)
    assert float(jnp.std(stacked)) == pytest.approx(math.sqrt(0.1 / 64), rel=0.02)
