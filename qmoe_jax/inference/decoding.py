# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding of a whole model, all positions recomputed for each token."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32

from qmoe_jax.models.config import SwitchConfig
from qmoe_jax.models.switch import Switch


def greedy(
    config: SwitchConfig,
    params: Mapping[str, Any],
    encoder_input_tokens: Int32[np.ndarray, "B S"],
    length: int,
    *,
    eos_id: int = 1,
    dtype: DTypeLike = jnp.float32,
) -> Int32[np.ndarray, "B length"]:
    """The likeliest token at each position, given those before it; 0 after EOS.

    Without a cache: each new token costs one pass of the decoder over all `length` positions.

    Args:
      config: sizes.
      params: the model's parameters, nested as in T5X.
      encoder_input_tokens: ids, 0 is padding.
      length: of the output, at most.
      eos_id: ends a row.
      dtype: of the activations.
    """
    model = Switch(config, dtype)
    tokens_BS = jnp.asarray(encoder_input_tokens)
    encoded_BSD = _encode(model, params, tokens_BS)
    target_BL = jnp.zeros((len(tokens_BS), length), jnp.int32)
    ended_B = np.zeros(len(tokens_BS), bool)
    for position in range(length):
        target_BL = _next(model, params, encoded_BSD, tokens_BS, target_BL, jnp.int32(position))
        ended_B |= np.asarray(target_BL[:, position]) == eos_id
        if ended_B.all():
            break
    found = np.array(target_BL)
    after_eos = np.cumsum(found == eos_id, axis=1) - (found == eos_id) > 0
    return np.where(after_eos, 0, found)


@functools.partial(jax.jit, static_argnums=0)
def _encode(model: Switch, params: Mapping[str, Any], tokens_BS: Int[Array, "B S"]):
    return model.apply({"params": params}, tokens_BS, method="encode")


@functools.partial(jax.jit, static_argnums=0)
def _next(
    model: Switch,
    params: Mapping[str, Any],
    encoded_BSD: Float[Array, "B S D"],
    tokens_BS: Int[Array, "B S"],
    target_BL: Int[Array, "B L"],
    position: Int[Array, ""],
) -> Int[Array, "B L"]:
    """`target` with its token at `position`; later ones are not attended to, whatever they are."""
    inputs_BL = jnp.pad(target_BL, ((0, 0), (1, 0)))[:, :-1]
    all_valid_BL = jnp.ones_like(target_BL)
    logits_BLV = model.apply(
        {"params": params}, encoded_BSD, tokens_BS, inputs_BL, all_valid_BL, method="decode"
    )
    assert isinstance(logits_BLV, jax.Array)
    return target_BL.at[:, position].set(jnp.argmax(logits_BLV[:, position], axis=-1))
