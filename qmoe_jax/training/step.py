# SPDX-License-Identifier: Apache-2.0
"""The state of a training and one step of it; pure, to be compiled by whoever runs them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qmoe_jax.models.config import SwitchConfig
from qmoe_jax.models.switch import Switch
from qmoe_jax.training import loss
from qmoe_jax.training.batches import Batch
from qmoe_jax.training.loss import Loss, Metrics
from qmoe_jax.training.optimizer import Schedule


class TrainState(NamedTuple):
    """All that changes; what a resumed run needs."""

    updates: jax.Array  # int32[], made so far by this run and those that it resumes
    params: Any  # T5X tree, float32
    optimizer: Any


def new_params(config: SwitchConfig, random_seed: int) -> Any:
    """Random parameters, T5X's tree."""
    tokens_BL = jnp.zeros((1, 1), jnp.int32)
    return Switch(config).init(jax.random.key(random_seed), tokens_BL, tokens_BL, tokens_BL)[
        "params"
    ]


def new_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: Switch,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    factors: Loss,
    random_seed: int,
) -> tuple[TrainState, Metrics]:
    """One update.

    The dropout of update n depends on the seed and n alone. The metrics are those of the loss,
    `gradient_norm`, `learning_rate` and `parameter_norm`, of the parameters made.
    """
    # Not the key of the parameters: update 0 would drop what they were drawn from.
    key = jax.random.fold_in(jax.random.key(random_seed), 1)
    dropout_key = jax.random.fold_in(key, state.updates)
    gradient = jax.grad(loss.training_loss, has_aux=True)
    gradients, metrics = gradient(state.params, batch, model, factors, dropout_key)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    metrics["gradient_norm"] = optax.tree.norm(gradients)
    metrics["learning_rate"] = schedule(state.updates)
    params = optax.apply_updates(state.params, updates)
    metrics["parameter_norm"] = optax.tree.norm(params)
    return TrainState(state.updates + 1, params, optimizer_state), metrics
