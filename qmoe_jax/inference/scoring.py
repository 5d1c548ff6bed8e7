# SPDX-License-Identifier: Apache-2.0
"""How likely a model holds given targets to be."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qmoe_jax.inference.model import Model, checked_ids
from qmoe_jax.models.switch import Switch


def score(
    model: Model,
    encoder_input_tokens: Int[np.ndarray, "B S"],
    decoder_target_tokens: Int[np.ndarray, "B L"],
) -> Float[np.ndarray, " B"]:
    """Natural logarithm of the probability of each row's targets, given its inputs.

    As T5X's `score_batch`: a sum over the targets, of which padding (0) counts nothing.

    Raises:
      ValueError: an id outside of the vocabulary.
    """
    inputs_BS = checked_ids(model, "encoder_input_tokens", encoder_input_tokens)
    targets_BL = checked_ids(model, "decoder_target_tokens", decoder_target_tokens)
    return np.asarray(_score(model.module, model.variables, inputs_BS, targets_BL))


@functools.partial(jax.jit, static_argnames="module")
def _score(
    module: Switch,
    variables: Mapping[str, Any],
    inputs_BS: Int[Array, "B S"],
    targets_BL: Int[Array, "B L"],
) -> Float[Array, " B"]:
    shifted_BL = jnp.pad(targets_BL, ((0, 0), (1, 0)))[:, :-1]
    logits_BLV: Any = module.apply(variables, inputs_BS, shifted_BL, targets_BL)
    log_probs_BLV = jax.nn.log_softmax(logits_BLV, axis=-1)
    own_BL = jnp.take_along_axis(log_probs_BLV, targets_BL[:, :, None], axis=2)[:, :, 0]
    return jnp.sum(jnp.where(targets_BL > 0, own_BL, 0.0), axis=1)
