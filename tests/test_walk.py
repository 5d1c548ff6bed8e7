# SPDX-License-Identifier: Apache-2.0
"""Block by block over host buffers gives what the whole model gives in one call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_switch

from qmoe_jax.calibration import data, experts, walk
from qmoe_jax.models import config as configs
from qmoe_jax.models.block import make_block
from qmoe_jax.models.switch import Switch

FLOAT32 = np.dtype(np.float32)


@pytest.fixture(scope="module")
def samples():
    """Documents of many lengths: several batches, several buckets."""
    rng = np.random.default_rng(0)
    made = []
    for length in (5, 64, 65, 100, 17, 70, 3):
        targets = rng.integers(1, 512, max(2, length // 4)).astype(np.int32)
        inputs = np.concatenate([[0], targets[:-1]]).astype(np.int32)
        made.append(data.Sample(rng.integers(1, 512, length).astype(np.int32), inputs, targets))
    return data.stack_samples(made)


def walked_losses(name, samples, batch_tokens=128, folder=None):
    config, params = tiny_switch.config(name), tiny_switch.params(name)
    options = {"batch_tokens": batch_tokens, "folder": folder}
    encoded, state = None, None
    for stack in configs.STACKS:
        state = walk.start(params, samples, stack, FLOAT32, encoded=encoded, **options)
        for layer in range(configs.num_layers(config, stack)):
            block = make_block(config, stack, layer, FLOAT32)
            layer_params = params[stack][f"layers_{layer}"]
            routes = walk.run_block(block, params, layer_params, state)
            assert (routes is not None) == block.sparse
            if routes is not None:
                run_all_experts(block, layer_params, state, routes)
            state = walk.advance(state)
        encoded = walk.finish(params, state, FLOAT32)
    assert state is not None
    return walk.losses(config, params, state)


def run_all_experts(block, layer_params, state, routes):
    stacked = {name: leaf["kernel"] for name, leaf in layer_params["mlp"]["expert"].items()}
    assigned = experts.assign(routes, block.config.num_experts)
    experts.run_experts(block, layer_params, stacked, 0, state.updated, routes, assigned)


@functools.cache
def whole_model(name):
    return tiny_switch.quick_jit(Switch(tiny_switch.config(name)).apply)


def whole_model_losses(name, samples):
    params = {"params": tiny_switch.params(name)}
    totals = []
    for sample in samples:
        padded = [np.zeros((1, 128), np.int32) for _ in range(3)]
        arrays = (
            sample.encoder_input_tokens,
            sample.decoder_input_tokens,
            sample.decoder_target_tokens,
        )
        for row, array in zip(padded, arrays, strict=True):
            row[0, : len(array)] = array
        logits = whole_model(name)(params, *map(jnp.asarray, padded))[0, : len(arrays[2])]
        log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
        totals.append(-log_probs[np.arange(len(arrays[2])), arrays[2]].sum())
    return np.array(totals)


@pytest.mark.parametrize("name", tiny_switch.MODELS)
def test_losses_are_those_of_the_whole_model(name, samples):
    found = walked_losses(name, samples)
    np.testing.assert_allclose(found.total, whole_model_losses(name, samples), rtol=1e-5)
    np.testing.assert_array_equal(found.targets, samples.decoder_lengths)
    assert found.mean == pytest.approx(found.total.sum() / found.targets.sum())


@pytest.mark.parametrize(("at", "where"), [("input", "stack's last block"), ("norm", "norm after")])
def test_a_stack_that_ends_in_nan_is_not_finished(samples, at, where):
    """What the last block's experts make is seen by no other block."""
    params = tiny_switch.params("tiny_switch_base")
    state = walk.start(params, samples, "encoder", FLOAT32, batch_tokens=128)
    if at == "input":
        state.current.data[state.current.offsets[3], 5] = np.inf
    else:
        params = jax.tree.map(lambda leaf: leaf * np.float32(np.inf), params)
    with pytest.raises(ValueError, match=rf"activations of sample \d become NaN .* in the {where}"):
        walk.finish(params, state, FLOAT32)


def test_losses_that_are_not_finite_are_named(samples):
    config, params = tiny_switch.config("tiny_switch_base"), tiny_switch.params("tiny_switch_base")
    zeros = walk.start(params, samples, "encoder", FLOAT32, batch_tokens=128)
    encoded = walk.finish(params, zeros, FLOAT32)
    state = walk.start(params, samples, "decoder", FLOAT32, batch_tokens=128, encoded=encoded)
    state.updated.data[state.updated.offsets[2], 0] = np.nan
    with pytest.raises(ValueError, match="the loss of sample 2 becomes NaN or infinite"):
        walk.losses(config, params, state)


def test_memory_mapped_buffers_change_nothing(samples, tmp_path):
    in_memory = walked_losses("tiny_switch_base", samples)
    mapped = walked_losses("tiny_switch_base", samples, folder=tmp_path)
    np.testing.assert_array_equal(in_memory.total, mapped.total)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "decoder.a",
        "decoder.b",
        "encoder.a",
        "encoder.b",
    ]


def test_standard_error_is_that_of_resampling(samples):
    rng = np.random.default_rng(0)
    targets = rng.integers(5, 50, 400)
    total = targets * (2 + 0.3 * rng.normal(size=400))
    losses = walk.SampleLosses(total, targets)
    picks = rng.integers(0, 400, (2000, 400))
    spread = (total[picks].sum(1) / targets[picks].sum(1)).std()
    assert losses.standard_error == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize(("at_input", "when"), [(True, "before"), (False, "in")])
def test_activations_that_are_not_finite_are_named(samples, at_input, when):
    config, params = tiny_switch.config("tiny_switch_base"), tiny_switch.params("tiny_switch_base")
    state = walk.start(params, samples, "encoder", FLOAT32, batch_tokens=128)
    layer_params = params["encoder"]["layers_0"]
    if at_input:
        state.current.data[state.current.offsets[3], 5] = np.nan
        message = "sample 3 "
    else:
        layer_params = jax.tree.map(lambda leaf: leaf * np.float32(1e30), layer_params)
        message = r"sample \d "
    block = make_block(config, "encoder", 0, FLOAT32)
    with pytest.raises(ValueError, match=rf"activations of {message}.* {when} this block's dense"):
        walk.run_block(block, params, layer_params, state)
