# SPDX-License-Identifier: Apache-2.0
"""A model with its parameters: what all of inference takes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

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
