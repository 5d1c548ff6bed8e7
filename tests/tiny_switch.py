# SPDX-License-Identifier: Apache-2.0
"""The three tiny Switch Transformers of `tests/data/t5x`, and what T5X computed with them."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from qmoe_jax.checkpoints import t5x
from qmoe_jax.models.config import SwitchConfig, config_from_shapes

DATA = pathlib.Path(__file__).parent / "data" / "t5x"
MODELS = ("tiny_switch_base", "tiny_switch_c", "tiny_switch_xxl")
SETS = ("nopad", "pad", "odd", "single")
CAPACITIES = ("nodrop", "default", "drop")
# The capacity settings of T5X's gin files (switch_{base,c,xxl}.gin), and of the two other cases.
GIN = {
    "tiny_switch_base": {"eval_capacity_factor": 2.0, "min_expert_capacity": 4},
    "tiny_switch_c": {"eval_capacity_factor": 2.0, "min_expert_capacity": 2},
    "tiny_switch_xxl": {"eval_capacity_factor": 4.0, "min_expert_capacity": 2},
}
OVERRIDES = {
    "nodrop": {"eval_capacity_factor": 8.0},
    "default": {},
    "drop": {"eval_capacity_factor": 1.0, "min_expert_capacity": 1},
}


@functools.cache
def flat_params(name: str) -> Mapping[str, np.ndarray]:
    checkpoint = t5x.open_checkpoint(DATA / name / "legacy")
    read = t5x.read_many(checkpoint, list(checkpoint.leaves))
    return {path: array.astype(np.float32) for path, array in read.items()}


@functools.cache
def params(name: str) -> Any:
    return jax.tree.map(jnp.asarray, unflatten_dict(dict(flat_params(name)), sep="/"))


@functools.cache
def reference(name: str) -> Mapping[str, np.ndarray]:
    with np.load(DATA / name / "reference.npz") as file:
        return dict(file)


@functools.cache
def routing(name: str) -> Mapping[str, Any]:
    """T5X's groups, capacities and losses, by `{set}.{capacity}` and `{stack}/layers_{i}`."""
    return json.loads((DATA / name / "routing.json").read_text())


def config(name: str, capacity: str = "default") -> SwitchConfig:
    sizes = config_from_shapes({path: array.shape for path, array in flat_params(name).items()})
    return dataclasses.replace(sizes, **(GIN[name] | OVERRIDES[capacity]))


def tokens(name: str, token_set: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Inputs of the encoder, inputs of the decoder, targets."""
    arrays = reference(name)
    return (
        jnp.asarray(arrays[f"{token_set}.encoder_input_tokens"]),
        jnp.asarray(arrays[f"{token_set}.decoder_input_tokens"]),
        jnp.asarray(arrays[f"{token_set}.decoder_target_tokens"]),
    )


def logits(module: Any, variables: Any, *tokens: Any) -> jax.Array:
    """Of a whole forward pass, compiled once for a model and shapes."""
    return _apply(module, variables, *map(jnp.asarray, tokens))


def quick_jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit` that compiles for a short wait: what runs here runs once."""
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function, compiler_options=quick, **options)


_apply = quick_jit(lambda module, *given: module.apply(*given), static_argnums=0)
