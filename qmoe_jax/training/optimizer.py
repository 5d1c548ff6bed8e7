# SPDX-License-Identifier: Apache-2.0
"""The optimizer and its learning rate, from optax, set as T5X sets its own."""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

OPTIMIZERS = ("adafactor", "adamw")
SCHEDULES = ("rsqrt", "cosine", "linear", "constant")
DECAYING = ("cosine", "linear")  # to 0 at the last step

Schedule = Callable[[ArrayLike], jax.Array]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What updates the parameters; the defaults are those of T5X's `pretrain.gin`.

    Attributes:
      name: "adafactor" (without momentum) or "adamw".
      schedule: "rsqrt": learning_rate / sqrt(max(step, warmup_steps)). "constant", "linear",
        "cosine": linear warm-up to `learning_rate`, then as named, to 0 at the last step.
      learning_rate: relative to a parameter's own size with Adafactor, absolute with AdamW.
      warmup_steps: see `schedule`.
      max_grad_norm: gradients with a larger global norm are scaled to it; None: never.
      weight_decay: AdamW's, times the learning rate; with Adafactor the share that a step takes, as
        in T5X. Norm scales and position biases do not decay.
      beta1, beta2: AdamW's.
    """

    name: str = "adafactor"
    schedule: str = "rsqrt"
    learning_rate: float = 1.0
    warmup_steps: int = 10_000
    max_grad_norm: float | None = None
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999

    def __post_init__(self):
        _check("OPTIMIZER", self.name, self.name in OPTIMIZERS, " or ".join(map(repr, OPTIMIZERS)))
        known = ", ".join(map(repr, SCHEDULES))
        _check("SCHEDULE", self.schedule, self.schedule in SCHEDULES, f"one of {known}")
        rate, norm = self.learning_rate, self.max_grad_norm
        _check("LEARNING_RATE", rate, 0 < rate < math.inf, "a number above 0")
        _check("WARMUP_STEPS", self.warmup_steps, self.warmup_steps >= 0, "0 or more")
        _check("MAX_GRAD_NORM", norm, norm is None or norm > 0, "None or a number above 0")
        _check("WEIGHT_DECAY", self.weight_decay, 0 <= self.weight_decay < 1, "0 to below 1")
        _check("BETA1", self.beta1, 0 <= self.beta1 < 1, "0 to below 1")
        _check("BETA2", self.beta2, 0 <= self.beta2 < 1, "0 to below 1")


def make_schedule(optimizer: Optimizer, first_step: int, last_step: int) -> Schedule:
    """The learning rate by the number of updates made, for a run of steps `first_step` on.

    Warm-up and decay lie between `first_step` and `last_step`; "rsqrt" goes by the step itself, so
    that it goes on where an earlier training was.

    Raises:
      ValueError: the warm-up of a decaying schedule takes all steps.
    """
    warmup, rate = optimizer.warmup_steps, optimizer.learning_rate
    steps = last_step - first_step
    if optimizer.schedule in DECAYING and warmup >= steps:
        raise ValueError(
            f"WARMUP_STEPS is {warmup}; with SCHEDULE {optimizer.schedule!r} expected fewer than "
            f"the {steps} steps of the run"
        )

    def learning_rate(count: ArrayLike) -> jax.Array:
        done = jnp.asarray(count, jnp.float32)
        if optimizer.schedule == "rsqrt":
            return rate / jnp.sqrt(jnp.maximum(done + first_step, float(max(warmup, 1))))
        rising = jnp.minimum((done + 1) / max(warmup, 1), 1.0)
        if optimizer.schedule == "constant":
            return rate * rising
        decayed = jnp.clip((done - warmup) / (steps - warmup), 0.0, 1.0)
        if optimizer.schedule == "linear":
            return rate * rising * (1 - decayed)
        return rate * rising * 0.5 * (1 + jnp.cos(math.pi * decayed))

    return learning_rate


def make_optimizer(optimizer: Optimizer, schedule: Schedule) -> optax.GradientTransformation:
    """The transformation of gradients into updates, clipping included."""
    make = {"adafactor": _adafactor, "adamw": _adamw}[optimizer.name]
    transformation = make(optimizer, schedule)
    if optimizer.max_grad_norm is None:
        return transformation
    return optax.chain(optax.clip_by_global_norm(optimizer.max_grad_norm), transformation)


def _adamw(optimizer: Optimizer, schedule: Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        schedule,
        optimizer.beta1,
        optimizer.beta2,
        weight_decay=optimizer.weight_decay,
        mask=_decays,
    )


def _adafactor(optimizer: Optimizer, schedule: Schedule) -> optax.GradientTransformation:
    """Factored as T5X does it: matrices, whatever their size, but routers and position biases not.

    Each expert is a matrix of its own, with its own clipping and scale (T5X: contrib/moe,
    adafactor_utils.py).
    """
    adafactor = functools.partial(
        optax.adafactor,
        schedule,
        min_dim_size_to_factor=1,
        weight_decay_rate=optimizer.weight_decay or None,
        weight_decay_mask=_decays,
    )
    kinds: dict[Hashable, optax.GradientTransformation] = {
        "expert": _each_expert(adafactor()),
        "matrix": adafactor(),
        "whole": adafactor(factored=False),
    }
    return optax.multi_transform(kinds, _kinds)


def _each_expert(one: optax.GradientTransformation) -> optax.GradientTransformation:
    """A transformation of one expert's parameters, applied to stacks of them."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.vmap(one.update)(updates, state, params)

    return optax.GradientTransformation(jax.vmap(one.init), update)


def _kinds(params: Any) -> Any:
    def kind(path: tuple[Any, ...], _: Any) -> str:
        names = {key.key for key in path}
        if "expert" in names:
            return "expert"
        return "whole" if names & {"router", "rel_embedding", "scale"} else "matrix"

    return jax.tree_util.tree_map_with_path(kind, params)


def _decays(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in ("scale", "rel_embedding"), params
    )


def _check(name: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}; expected {expected}")
