# SPDX-License-Identifier: Apache-2.0
"""How the experts of a model are to be quantized, and what can be stored of it."""

import dataclasses
from typing import Any, Literal, get_args

from qmoe_jax.quantization import gptq, grids
from qmoe_jax.quantization.gptq import GptqOptions, GridFit

Method = Literal["gptq", "rtn"]


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """The method and its settings; the defaults are the paper's.

    Attributes:
      method: "gptq", or "rtn": round to nearest, no Hessian, no solve.
      bits: "ternary" (also 1.5, the paper's name for it), 2, 3 or 4.
      damping: of the mean of the Hessian's diagonal.
      block_size: columns solved between two large products; changes speed, not levels.
      group_size: columns that share a grid; None: the whole row.
      activation_order: solve the columns of large activations first.
      grid: "minmax": a row's values are its range; "least_squares": what makes the layer's error
        least (ternary only).
      penalty: with "least_squares": what a weight other than 0 must win for each bit it costs.
      sweeps: of "least_squares", in which all weights are rounded anew.
      true_sequential: the Hessian of `wo` from the compressed `wi`, not the original.
      token_cap: at most this times the mean of tokens over experts goes into one Hessian.
      mask_special_tokens: leave sentinels out of the Hessians.
    """

    method: Method = "gptq"
    bits: Any = "ternary"
    damping: float = 0.1
    block_size: int = 128
    group_size: int | None = None
    activation_order: bool = False
    grid: GridFit = "minmax"
    penalty: float = 0.0
    sweeps: int = 3
    true_sequential: bool = False
    token_cap: float = 4.0
    mask_special_tokens: bool = True

    def __post_init__(self):
        object.__setattr__(self, "bits", grids.parse_bits(self.bits))
        if self.method not in ("gptq", "rtn"):
            raise ValueError(f"METHOD is {self.method!r}; expected 'gptq' or 'rtn'")
        if self.method == "rtn" and self.group_size:
            raise ValueError("GROUP_SIZE is for METHOD 'gptq'; round-to-nearest has one grid a row")
        if self.grid not in get_args(GridFit):
            raise ValueError(f"GRID is {self.grid!r}; expected 'minmax' or 'least_squares'")
        if self.grid != "minmax" and (self.method == "rtn" or self.bits != "ternary"):
            raise ValueError(
                f"GRID {self.grid!r} is for METHOD 'gptq' and BITS 'ternary', not for METHOD "
                f"{self.method!r} and BITS {self.bits!r}"
            )
        if not self.token_cap > 0:
            raise ValueError(f"TOKEN_CAP is {self.token_cap}; expected more than 0")
        _ = self.options  # checks the rest

    @property
    def options(self) -> GptqOptions:
        """What the solver takes."""
        return gptq.GptqOptions(
            damping=self.damping,
            block_size=self.block_size,
            group_size=self.group_size,
            activation_order=self.activation_order,
            grid=self.grid,
            penalty=self.penalty,
            sweeps=self.sweeps,
        )
