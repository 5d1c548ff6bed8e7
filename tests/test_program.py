# SPDX-License-Identifier: Apache-2.0
"""Programs and their steps, on one device."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny_training
from flax.traverse_util import flatten_dict

from qmoe_jax.models import config as configs
from qmoe_jax.training import program
from qmoe_jax.training.batches import Batch


@functools.cache
def build():
    return program.build(tiny_training.recipe(), dtype=np.float32, devices=jax.devices()[:1])


def stacked(*batches: Batch) -> Batch:
    return Batch(*map(np.concatenate, zip(*batches, strict=True)))


def test_the_state_begins_with_the_model_of_t5x():
    built = build()
    state = program.new_state(built)
    shapes = flatten_dict(jax.tree.map(np.shape, state.params), sep="/")
    assert shapes == configs.param_shapes(tiny_training.DROPPING)
    described = [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(built.state)]
    made = [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(state)]
    assert made == described
    assert int(state.updates) == 0
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(close, state.params, tiny_training.params(tiny_training.DROPPING))
    other = tiny_training.params(tiny_training.DROPPING, 1)
    assert not np.allclose(*(one["token_embedder"]["embedding"] for one in (state.params, other)))


def test_the_state_can_begin_with_given_parameters():
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), build().state.params)
    state = program.new_state(build(), params)
    assert all(np.all(np.asarray(leaf) == 0.5) for leaf in jax.tree.leaves(state.params))


def test_steps_learn_a_batch_by_heart():
    built = build()
    state, batch = program.new_state(built), program.on_devices(built, tiny_training.batch())
    losses = []
    for _ in range(30):
        state, metrics = built.train_step(state, batch)
        losses.append(float(metrics["cross_entropy"]))
    assert losses[-1] < 0.6 * losses[0]
    assert int(state.updates) == 30
    assert float(metrics["gradient_norm"]) > 0
    assert float(metrics["learning_rate"]) == pytest.approx(0.05)


def test_dropout_depends_on_the_update_alone():
    built = build()
    batch = program.on_devices(built, tiny_training.batch())

    def loss(updates: int) -> float:
        state = program.new_state(built)._replace(updates=np.int32(updates))
        return float(built.train_step(state, batch)[1]["loss"])

    assert loss(3) == loss(3)
    assert loss(3) != loss(4)


def test_evaluation_weighs_targets_equally_and_skips_empty_rows():
    built = build()
    params = program.new_state(built).params
    first, second = (tiny_training.batch(seed=seed) for seed in (1, 2))
    empty = Batch(*(np.zeros_like(tokens[3:]) for tokens in second))
    second = Batch(*(tokens[:3] for tokens in second))
    together = program.evaluate(built, params, [stacked(first, second)])
    parts = program.evaluate(built, params, [first, stacked(second, empty)])
    assert parts == pytest.approx(together, rel=1e-6)
    assert together != pytest.approx(program.evaluate(built, params, [first]), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_steps": 0}, "TRAIN_STEPS is 0; expected 1 or more"),
        ({"batch_size": 0}, "BATCH_SIZE is 0; expected 1 or more"),
        ({"random_seed": -1}, "RANDOM_SEED is -1; expected 0 or more"),
    ],
)
def test_recipes_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_training.recipe(**changes)


def test_a_model_without_experts_is_refused():
    dense = dataclasses.replace(
        tiny_training.MODEL, encoder_sparse_layers=(), decoder_sparse_layers=()
    )
    with pytest.raises(ValueError, match="MODEL has no sparse layer"):
        tiny_training.recipe(model=dense)


def test_each_device_needs_equally_many_samples():
    with pytest.raises(ValueError, match="BATCH_SIZE is 6; expected a multiple of the 4 devices"):
        program.build(
            tiny_training.recipe(batch_size=6), dtype=np.float32, devices=[jax.devices()[0]] * 4
        )
