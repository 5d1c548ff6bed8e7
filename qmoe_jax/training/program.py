# SPDX-License-Identifier: Apache-2.0
"""A training laid out on a mesh: compiled step, where its arrays live, how they come there."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from qmoe_jax.models.config import SwitchConfig
from qmoe_jax.models.routing import Capacity
from qmoe_jax.models.switch import Switch
from qmoe_jax.training import loss, optimizer, parallel, step
from qmoe_jax.training.batches import Batch
from qmoe_jax.training.loss import Loss, Metrics, TargetSums
from qmoe_jax.training.optimizer import Optimizer
from qmoe_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What decides how parameters change, the text aside; the settings are those of `runs.train`.

    Raises:
      ValueError: a setting that cannot be.
    """

    model: SwitchConfig
    optimizer: Optimizer
    loss: Loss
    train_steps: int
    batch_size: int
    capacity: Capacity
    random_seed: int

    def __post_init__(self):
        if not self.model.encoder_sparse_layers and not self.model.decoder_sparse_layers:
            raise ValueError("MODEL has no sparse layer; expected a Switch Transformer")
        for name, least in (("train_steps", 1), ("batch_size", 1), ("random_seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name.upper()} is {value}; expected {least} or more")


@dataclasses.dataclass(frozen=True)
class Program:
    """What runs the steps of one training.

    Attributes:
      state: shapes, dtypes and shardings of the state (`jax.ShapeDtypeStruct`).
      train_step: consumes a state and a batch; returns the next state and metrics.
      evaluation_sums: of parameters and a batch.
    """

    recipe: Recipe
    mesh: Mesh
    state: TrainState
    transformation: optax.GradientTransformation
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    evaluation_sums: Callable[[Any, Batch], TargetSums]


def build(
    recipe: Recipe,
    *,
    dtype: DTypeLike,
    first_step: int = 0,
    partitions: int | None = None,
    devices: Iterable[Any] | None = None,
) -> Program:
    """Lays a training out on all devices; nothing is compiled before its first call.

    Args:
      recipe: what to do.
      dtype: of activations; parameters and what is kept for them are float32.
      first_step: of the parameters that training begins with.
      partitions, devices: see `parallel.make_mesh`.

    Raises:
      ValueError: settings that cannot be together.
    """
    config = recipe.model
    mesh = parallel.make_mesh(config.num_experts, partitions, devices)
    if recipe.batch_size % mesh.size:
        raise ValueError(
            f"BATCH_SIZE is {recipe.batch_size}; expected a multiple of the {mesh.size} devices"
        )
    schedule = optimizer.make_schedule(recipe.optimizer, first_step, recipe.train_steps)
    transformation = optimizer.make_optimizer(recipe.optimizer, schedule)
    state = jax.eval_shape(lambda: _random_state(recipe, transformation))
    shardings = parallel.state_shardings(mesh, state, config.num_experts)
    model = Switch(config, dtype, parallel.experts_on(mesh, config), recipe.capacity)
    train_step = functools.partial(
        step.train_step,
        model=model,
        optimizer=transformation,
        schedule=schedule,
        factors=recipe.loss,
        random_seed=recipe.random_seed,
    )
    return Program(
        recipe=recipe,
        mesh=mesh,
        state=jax.tree.map(_struct, state, shardings),
        transformation=transformation,
        train_step=jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None)),
        evaluation_sums=jax.jit(functools.partial(loss.evaluation_sums, model=model)),
    )


def new_state(program: Program, params: Mapping[str, Any] | None = None) -> TrainState:
    """The state before the first update, on the program's devices.

    Args:
      program: from `build`.
      params: T5X tree of arrays to begin with; None: random ones.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    recipe, transformation = program.recipe, program.transformation
    if params is None:
        make = functools.partial(_random_state, recipe, transformation)
        return jax.jit(make, out_shardings=shardings)()
    make = functools.partial(step.new_state, optimizer=transformation)
    return jax.jit(make, out_shardings=shardings)(jax.device_put(params, shardings.params))


def on_devices(program: Program, batch: Batch) -> Batch:
    """The batch, cut over the devices; its arrays must not be written any more."""
    return jax.device_put(batch, parallel.batch_sharding(program.mesh))


def evaluate(program: Program, params: Any, validation: Iterable[Batch]) -> float:
    """Mean cross entropy of all targets, in nats."""
    sums = [program.evaluation_sums(params, on_devices(program, batch)) for batch in validation]
    fetched = jax.device_get(sums)
    targets = np.sum([one.targets for one in fetched], dtype=np.float64)
    return float(np.sum([one.cross_entropy for one in fetched], dtype=np.float64) / targets)


def _struct(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _random_state(recipe: Recipe, transformation: optax.GradientTransformation) -> TrainState:
    return step.new_state(step.new_params(recipe.model, recipe.random_seed), transformation)
