# SPDX-License-Identifier: Apache-2.0
"""A model with its parameters: what all of inference takes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from qmoe_jax.models.config import SwitchConfig
from qmoe_jax.models.switch import Switch


@dataclasses.dataclass(frozen=True)
class Model:
    """A Switch Transformer to be applied: `model.module.apply(model.variables, ...)`."""

    module: Switch
    variables: Mapping[str, Any]  # "params" and, of packed experts, "packed"; on the device

    @property
    def config(self) -> SwitchConfig:
        return self.module.config

    @property
    def nbytes(self) -> int:
        """Of all arrays, each counted once."""
        arrays = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(self.variables)}
        return sum(arrays.values())


def checked_ids(model: Model, name: str, ids: Int[np.ndarray, "B L"]) -> Int[Array, "B L"]:
    """Token ids on the device; one that no embedding has would become NaN without a word.

    Raises:
      ValueError: an id outside of the vocabulary.
    """
    vocab_size = model.config.vocab_size
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(
            f"`{name}` holds ids from {ids.min()} to {ids.max()}; this model's are 0 to "
            f"{vocab_size - 1}"
        )
    return jnp.asarray(ids)
