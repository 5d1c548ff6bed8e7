# SPDX-License-Identifier: Apache-2.0
"""The whole model, and the model block by block, against what T5X computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_switch

from qmoe_jax.models import attention, moe, switch
from qmoe_jax.models.block import Block, make_block
from qmoe_jax.models.config import STACKS, num_layers, sparse_layers
from qmoe_jax.models.layers import rms_norm


def forward(model, *tokens):
    """A method of `Switch`: the encoder's output and the logits."""
    encoded = model.encode(tokens[0])
    return encoded, model.decode(encoded, *tokens)


def compiled(model):
    """Encoder output, logits, and what the routers sowed."""

    def run(params, *tokens):
        return model.apply({"params": params}, *tokens, method=forward, mutable="intermediates")

    return tiny_switch.quick_jit(run)


@pytest.mark.parametrize("name", tiny_switch.MODELS)
def test_model_is_t5x(name):
    """With the capacity of T5X's gin files; `test_blocks_are_t5x` has the other two."""
    run = compiled(switch.Switch(tiny_switch.config(name), capacity="t5x"))
    for token_set in tiny_switch.SETS:
        tokens = tiny_switch.tokens(name, token_set)
        (encoded, logits), state = run(tiny_switch.params(name), *tokens)
        check_outputs(name, f"{token_set}.default", encoded, logits)
        check_routing(name, f"{token_set}.default", state["intermediates"])


def check_outputs(name, case, encoded, logits):
    """Against T5X's, and exactly 0 at padding."""
    reference, token_set = tiny_switch.reference(name), case.split(".")[0]
    encoded, logits = jax.device_get((encoded, logits))
    got = logits[..., reference["logit_columns"]]
    np.testing.assert_allclose(got, reference[f"{case}.logits"], rtol=0, atol=1e-4, err_msg=case)
    wanted = reference[f"{case}.encoder_out"]
    np.testing.assert_allclose(encoded, wanted, rtol=0, atol=1e-4, err_msg=case)
    assert (encoded.dtype, logits.dtype) == (np.float32, np.float32)
    np.testing.assert_array_equal(
        np.any(encoded, axis=-1), reference[f"{token_set}.encoder_input_tokens"] > 0
    )
    valid = reference[f"{token_set}.decoder_input_tokens"] > 0
    valid[:, 0] = True
    np.testing.assert_array_equal(np.any(logits, axis=-1), valid)


def check_routing(name, case, sown):
    """Experts, drops, gates and losses of every sparse layer, rows added by padding included."""
    sown = jax.device_get(sown)
    reference = tiny_switch.reference(name)
    for layer, numbers in tiny_switch.routing(name)[case].items():
        stack, index = layer.split("/")
        (experts,), (prob,), (balance,), (z_loss,) = (
            sown[stack][index]["mlp"][key]
            for key in ("expert_index", "router_prob", "auxiliary_loss", "router_z_loss")
        )
        dropped, case_layer = experts == 8, f"{case}.{layer}"
        np.testing.assert_array_equal(
            np.where(dropped, -1, experts), reference[f"{case_layer}.expert"], case_layer
        )
        gates = np.where(dropped, 0, prob)
        np.testing.assert_allclose(gates, reference[f"{case_layer}.gate"], rtol=0, atol=1e-5)
        assert dropped.sum() == numbers["dropped"]
        assert balance == pytest.approx(numbers["auxiliary_loss"], rel=1e-5)
        assert z_loss == pytest.approx(numbers["router_z_loss"], rel=1e-5)


def test_without_capacity_nothing_is_dropped():
    name = "tiny_switch_base"
    run = compiled(switch.Switch(tiny_switch.config(name, "drop"), capacity="none"))
    for token_set in ("nopad", "pad"):
        case, tokens = f"{token_set}.nodrop", tiny_switch.tokens(name, token_set)
        (encoded, logits), state = run(tiny_switch.params(name), *tokens)
        check_outputs(name, case, encoded, logits)
        experts = state["intermediates"]["encoder"]["layers_1"]["mlp"]["expert_index"][0]
        wanted = tiny_switch.reference(name)[f"{case}.encoder/layers_1.expert"]
        np.testing.assert_array_equal(experts[0], wanted.reshape(-1))


def test_bfloat16():
    """T5X's own bfloat16 logits are as far from its float32 ones; no token changes its expert."""
    name = "tiny_switch_base"
    config = tiny_switch.config(name, "nodrop")
    run = compiled(switch.Switch(config, dtype=jnp.bfloat16, capacity="t5x"))
    tokens, reference = tiny_switch.tokens(name, "nopad"), tiny_switch.reference(name)
    (encoded, logits), _ = run(tiny_switch.params(name), *tokens)
    assert (encoded.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    wanted = reference["nopad.nodrop.bf16_logits"]
    error = np.abs(np.asarray(logits)[..., reference["logit_columns"]] - wanted)
    assert np.quantile(error, 0.95) < 3e-2
    assert np.mean(error) < 1.5e-2


def test_residual_is_float32_from_the_first_sparse_block_on():
    config = tiny_switch.config("tiny_switch_base")

    def residuals(params, tokens):
        masks = attention.encoder_masks(tokens)
        bias = switch.relpos_bias(config, params, "encoder", tokens.shape[1], jnp.bfloat16)
        x = [switch.embed(params, tokens, jnp.bfloat16)]
        for i in range(config.num_encoder_layers):
            block = make_block(config, "encoder", i, jnp.bfloat16)
            variables = {"params": params["encoder"][f"layers_{i}"]}
            x.append(jnp.asarray(block.apply(variables, x[-1], masks, bias)))
        return *x, switch.final_norm(params, "encoder", x[-1], masks, jnp.bfloat16)

    tokens, _, _ = tiny_switch.tokens("tiny_switch_base", "single")
    shapes = jax.eval_shape(residuals, tiny_switch.params("tiny_switch_base"), tokens)
    low, high = jnp.bfloat16, jnp.float32
    assert [x.dtype for x in shapes] == [low, low, high, high, high, low]


encoder_masks = tiny_switch.quick_jit(attention.encoder_masks)
decoder_masks = tiny_switch.quick_jit(attention.decoder_masks)
switch_logits = tiny_switch.quick_jit(switch.logits, static_argnums=0)


@functools.partial(tiny_switch.quick_jit, static_argnums=0)
def whole_block(block, params, x, masks, bias, encoded):
    variables = {"params": params}
    return block.apply(variables, x, masks, bias, encoded, mutable="intermediates")


@functools.partial(tiny_switch.quick_jit, static_argnums=0)
def block_in_parts(block, params, x, masks, bias, encoded):
    """A sparse block as a compressor runs it: its dense part never sees the experts."""
    dense = {"params": params | {"mlp": {"router": params["mlp"]["router"]}}}
    x, index, prob = block.apply(dense, x, masks, bias, encoded, method="dense_part")
    rows = x.reshape(-1, x.shape[-1])
    normed = rms_norm(rows, params["pre_mlp_layer_norm"]["scale"], jnp.float32)
    y = moe.dense_experts(
        {"params": params["mlp"]["expert"]},
        normed,
        index.reshape(-1),
        activations=block.config.mlp_activations,
    )
    return (rows + prob.reshape(-1, 1) * y).reshape(x.shape), index


@functools.partial(tiny_switch.quick_jit, static_argnums=(0, 1))
def start(config, stack, ends, tokens):
    bias = switch.relpos_bias(config, ends, stack, tokens.shape[1], jnp.float32)
    return switch.embed(ends, tokens, jnp.float32), bias


@functools.partial(tiny_switch.quick_jit, static_argnums=0)
def finish(stack, ends, x, masks):
    return switch.final_norm(ends, stack, x, masks, jnp.float32)


def walk(name, stack, tokens, masks, encoded, apply_sparse):
    """One stack, with the parameters of one block at a time.

    `apply_sparse(layer, params, *inputs)` is given the name of the layer, like `encoder/layers_1`.
    """
    config, ends = tiny_switch.config(name), tiny_switch.params(name).copy()
    ends[stack] = ends[stack].copy()
    blocks = [ends[stack].pop(f"layers_{i}") for i in range(num_layers(config, stack))]
    x, bias = start(config, stack, ends, tokens)
    for i, params in enumerate(blocks):
        if i in sparse_layers(config, stack):
            x = apply_sparse(f"{stack}/layers_{i}", params, x, masks, bias, encoded)
        else:
            block = make_block(config, stack, i)
            x, _ = whole_block(block, params, x, masks, bias, encoded)
    return finish(stack, ends, x, masks)


def walk_model(name, token_set, apply_sparse):
    """Encoder output and logits."""
    inputs, decoder_inputs, targets = tiny_switch.tokens(name, token_set)
    encoded = walk(name, "encoder", inputs, encoder_masks(inputs), None, apply_sparse)
    masks = decoder_masks(decoder_inputs, targets, inputs)
    decoded = walk(name, "decoder", decoder_inputs, masks, encoded, apply_sparse)
    return encoded, switch_logits(tiny_switch.config(name), tiny_switch.params(name), decoded)


@pytest.mark.parametrize("capacity", ["nodrop", "drop"])
@pytest.mark.parametrize("name", tiny_switch.MODELS)
def test_blocks_are_t5x(name, capacity):
    config, sown = tiny_switch.config(name, capacity), {"encoder": {}, "decoder": {}}

    def sparse(layer, params, *inputs):
        stack, index = layer.split("/")
        block = Block(config, stack, sparse=True, capacity="t5x")
        x, state = whole_block(block, params, *inputs)
        sown[stack][index] = state["intermediates"]
        return x

    for token_set in tiny_switch.SETS:
        case = f"{token_set}.{capacity}"
        check_outputs(name, case, *walk_model(name, token_set, sparse))
        check_routing(name, case, sown)


@pytest.mark.parametrize("name", tiny_switch.MODELS)
def test_sparse_blocks_in_parts_are_t5x(name):
    def sparse(layer, params, x, masks, bias, encoded):
        block = Block(tiny_switch.config(name), layer.split("/")[0], sparse=True)
        x, index = block_in_parts(block, params, x, masks, bias, encoded)
        padding = ~np.asarray(masks.valid)
        np.testing.assert_array_equal(np.asarray(index)[padding], 8, "not of any expert")
        return x

    check_outputs(name, "pad.nodrop", *walk_model(name, "pad", sparse))


@pytest.mark.parametrize("stack", STACKS)
def test_sparse_block_is_the_sum_of_its_parts(stack):
    config, params = tiny_switch.config("tiny_switch_base"), tiny_switch.params("tiny_switch_base")
    inputs, decoder_inputs, targets = tiny_switch.tokens("tiny_switch_base", "nopad")
    masks, encoded, tokens = encoder_masks(inputs), None, inputs
    if stack == "decoder":
        masks = decoder_masks(decoder_inputs, targets, inputs)
        encoded, tokens = start(config, "encoder", params, inputs)[0], decoder_inputs
    x, bias = start(config, stack, params, tokens)
    block, block_params = make_block(config, stack, 1), params[stack]["layers_1"]
    got, _ = block_in_parts(block, block_params, x, masks, bias, encoded)
    wanted, _ = whole_block(block, block_params, x, masks, bias, encoded)
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


def test_dense_blocks_have_no_dense_part():
    config = tiny_switch.config("tiny_switch_base")
    params = {"params": tiny_switch.params("tiny_switch_base")["encoder"]["layers_0"]}
    x, masks = jnp.zeros((1, 2, 64)), attention.encoder_masks(jnp.ones((1, 2), jnp.int32))
    with pytest.raises(ValueError, match="`dense_part` is for sparse blocks"):
        make_block(config, "encoder", 0).apply(
            params, x, masks, jnp.zeros((4, 2, 2)), method="dense_part"
        )


def test_training_step_reaches_every_parameter():
    """With dropout and the capacity rule on, gradients are finite and no array is left out."""
    name = "tiny_switch_xxl"
    config = dataclasses.replace(
        tiny_switch.config(name),
        num_encoder_layers=1,  # a dense one
        num_decoder_layers=1,
        encoder_sparse_layers=(),
        decoder_sparse_layers=(0,),
        dropout_rate=0.1,
        expert_dropout_rate=0.1,
    )
    params, tokens = tiny_switch.params(name), tiny_switch.tokens(name, "nopad")
    decoder = {path: leaf for path, leaf in params["decoder"].items() if path != "layers_1"}
    decoder["layers_0"] = params["decoder"]["layers_1"]
    encoder = {path: leaf for path, leaf in params["encoder"].items() if path != "layers_1"}
    params = params | {"encoder": encoder, "decoder": decoder}
    model = switch.Switch(config, capacity="t5x")

    def loss(params, key):
        logits = model.apply(
            {"params": params}, *tokens, enable_dropout=True, rngs={"dropout": key}
        )
        log_prob = jax.nn.log_softmax(jnp.asarray(logits))
        return -jnp.mean(jnp.take_along_axis(log_prob, tokens[2][..., None], axis=-1))

    step = tiny_switch.quick_jit(jax.value_and_grad(loss))
    value, gradients = step(params, jax.random.key(0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients))
    assert step(params, jax.random.key(0))[0] == value
    assert step(params, jax.random.key(1))[0] != value
