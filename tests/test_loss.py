# SPDX-License-Identifier: Apache-2.0
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_switch
import tiny_training

from qmoe_jax.models.switch import Switch
from qmoe_jax.training import loss
from qmoe_jax.training.batches import Batch
from qmoe_jax.training.loss import Loss

KEY = jax.random.key(0)


def oracle(logits: np.ndarray, targets: np.ndarray, smoothing: float) -> tuple[float, float, int]:
    """Cross entropy against a distribution written out, and squares of log Z, in float64."""
    cross_entropy, square_log_z, correct = 0.0, 0.0, 0
    rows = logits.astype(np.float64).reshape(-1, logits.shape[-1])
    for row, target in zip(rows, targets.ravel(), strict=True):
        if target == 0:
            continue
        log_z = math.log(np.exp(row - row.max()).sum()) + row.max()
        wanted = np.full(row.size, smoothing / (row.size - 1))
        wanted[target] = 1 - smoothing
        entropy = -sum(p * math.log(p) for p in wanted if p > 0)
        cross_entropy += -(wanted * (row - log_z)).sum() - entropy
        square_log_z += log_z**2
        correct += row.argmax() == target
    return cross_entropy, square_log_z, correct


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_sums_are_those_of_the_definition(smoothing, scale):
    rng = np.random.default_rng(0)
    logits = (scale * rng.standard_normal((3, 7, 33))).astype(np.float32)
    targets = rng.integers(1, 33, (3, 7)).astype(np.int32)
    targets[0, 4:] = targets[2] = 0
    targets[1, :3] = logits[1, :3].argmax(-1)
    sums = loss.target_sums(jnp.asarray(logits), jnp.asarray(targets), smoothing)
    cross_entropy, square_log_z, correct = oracle(logits, targets, smoothing)
    np.testing.assert_allclose(sums.cross_entropy, cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(sums.square_log_z, square_log_z, rtol=1e-5)
    assert (int(sums.correct), int(sums.targets)) == (correct, 11)


def test_perfect_prediction_under_smoothing_costs_nothing():
    wanted = np.full((1, 1, 10), 0.1 / 9)
    wanted[0, 0, 3] = 0.9
    sums = loss.target_sums(jnp.log(jnp.asarray(wanted, jnp.float32)), jnp.array([[3]]), 0.1)
    assert abs(float(sums.cross_entropy)) < 1e-6


def test_evaluation_drops_nothing_out():
    batch = tiny_training.batch()
    dropping = dataclasses.replace(tiny_training.MODEL, dropout_rate=0.5, expert_dropout_rate=0.5)
    evaluate = tiny_switch.quick_jit(loss.evaluation_sums, static_argnames="model")
    sums = [
        evaluate(tiny_training.params(), batch, model=Switch(config))
        for config in (tiny_training.MODEL, dropping)
    ]
    assert sums[0] == sums[1]
    _, metrics = training_loss(tiny_training.params(), Switch(tiny_training.MODEL), batch, Loss())
    mean = sums[0].cross_entropy / sums[0].targets
    np.testing.assert_allclose(mean, metrics["cross_entropy"], rtol=1e-6)


def training_loss(params: Any, model: Switch, batch: Batch, factors: Loss):
    call = tiny_switch.quick_jit(loss.training_loss, static_argnames=("model", "factors"))
    return call(params, batch, model=model, factors=factors, dropout_key=KEY)


@pytest.mark.parametrize("capacity", ["none", "t5x"])
def test_training_loss_adds_up_and_balances_over_layers(capacity):
    """Nine rows of twelve: under T5X's rule tokens are padded to a multiple of the experts."""
    config = dataclasses.replace(tiny_training.MODEL, num_experts=5, min_expert_capacity=1)
    model = Switch(config, capacity=capacity)
    batch = tiny_training.batch(rows=9, inputs=7, targets=3)
    factors = Loss(z_loss=0.3, aux_loss_factor=0.2, router_z_loss_factor=0.1)
    params = tiny_training.params(config)
    value, metrics = training_loss(params, model, batch, factors)
    apply = tiny_switch.quick_jit(model.apply, static_argnames=("enable_dropout", "mutable"))
    logits, sown = apply(
        {"params": params}, *batch, enable_dropout=True, mutable=("intermediates",)
    )
    layers = [sown["intermediates"]["encoder"]["layers_1"]["mlp"]]
    layers.append(sown["intermediates"]["decoder"]["layers_0"]["mlp"])
    cross_entropy, square_log_z, correct = oracle(
        np.asarray(logits), batch.decoder_target_tokens, 0.0
    )
    targets = np.count_nonzero(batch.decoder_target_tokens)
    expected = {
        "cross_entropy": cross_entropy / targets,
        "z_loss": square_log_z / targets,
        "accuracy": correct / targets,
        "auxiliary_loss": np.mean([layer["auxiliary_loss"][0] for layer in layers]),
        "router_z_loss": np.mean([layer["router_z_loss"][0] for layer in layers]),
    }
    for name, wanted in expected.items():
        np.testing.assert_allclose(metrics[name], wanted, rtol=1e-5, err_msg=name)
    total = expected["cross_entropy"] + 0.3 * expected["z_loss"]
    total += 0.2 * expected["auxiliary_loss"] + 0.1 * expected["router_z_loss"]
    np.testing.assert_allclose(value, total, rtol=1e-5)
    assert value == metrics["loss"]


def test_the_busiest_expert_is_counted_without_padding_and_dropped_tokens():
    """An encoder whose router is zero sends all to expert 0, of which the capacity takes a part."""
    config = dataclasses.replace(tiny_training.MODEL, min_expert_capacity=1)
    batch = tiny_training.batch(rows=8, inputs=12, targets=4)
    shares = {}
    for capacity in ("none", "t5x"):
        model = Switch(config, capacity=capacity)
        params = jax.tree.map(lambda leaf: leaf, tiny_training.params(config))
        for stack, layer in (("encoder", "layers_1"), ("decoder", "layers_0")):
            router = params[stack][layer]["mlp"]["router"]["router_weights"]["w"]
            router["kernel"] = jnp.zeros_like(router["kernel"])
        _, metrics = training_loss(params, model, batch, Loss())
        shares[capacity] = float(metrics["busiest_expert"])
    assert shares["none"] == 1.0
    assert 0 < shares["t5x"] < 0.7


def test_gradients_reach_every_parameter():
    model = Switch(tiny_training.MODEL)
    params, batch = tiny_training.params(), tiny_training.batch(rows=16, inputs=24, targets=12)
    gradient = tiny_switch.quick_jit(
        jax.grad(loss.training_loss, has_aux=True), static_argnames=("model", "factors")
    )
    gradients, _ = gradient(params, batch, model=model, factors=Loss(), dropout_key=KEY)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert jnp.any(leaf != 0), path


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"label_smoothing": 1.0}, "LABEL_SMOOTHING is 1.0; expected 0 or more, below 1"),
        ({"z_loss": -1.0}, "Z_LOSS is -1.0; expected 0 or more"),
        ({"aux_loss_factor": math.nan}, "AUX_LOSS_FACTOR is nan"),
        ({"router_z_loss_factor": math.inf}, "ROUTER_Z_LOSS_FACTOR is inf"),
    ],
)
def test_factors_that_cannot_be(factors, message):
    with pytest.raises(ValueError, match=message):
        Loss(**factors)
