# SPDX-License-Identifier: Apache-2.0
"""Which code runs an operation."""

from typing import Any, Literal, TypeAlias

import jax

Implementation: TypeAlias = Literal["auto", "pallas", "triton", "xla"]

_OLDEST = 8.0  # compute capability; bfloat16 and `redux` begin there


def resolve(implementation: Implementation) -> Literal["pallas", "triton", "xla"]:
    """What "auto" means here: "pallas" if the default device is an NVIDIA GPU with compute
    capability 8.0 or newer, "xla" on every other. Any other choice is taken as it is: "triton" are
    the same kernels in Triton proper, called through jax-triton.

    Raises:
      ValueError: no such implementation.
    """
    match implementation:
        case "pallas" | "triton" | "xla":
            return implementation
        case "auto":
            return "pallas" if _has_kernels(jax.devices()[0]) else "xla"
    raise ValueError(
        f"`implementation` is {implementation!r}; expected 'auto', 'pallas', 'triton' or 'xla'"
    )


def available(implementation: Implementation) -> bool:
    """Whether the default device can run it; interpreters for tests aside."""
    return resolve(implementation) == "xla" or _has_kernels(jax.devices()[0])


def _has_kernels(device: Any) -> bool:
    capability = getattr(device, "compute_capability", "")
    cuda = device.platform == "gpu" and "." in capability and capability[0].isdigit()
    return cuda and float(capability) >= _OLDEST
