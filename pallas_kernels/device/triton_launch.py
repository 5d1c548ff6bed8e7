# SPDX-License-Identifier: Apache-2.0
"""Calls Triton kernels through jax-triton."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel with all that it is called with; its output's pointer follows the arguments."""

    kernel: Any
    arguments: tuple[Any, ...]
    output: jax.ShapeDtypeStruct
    grid: tuple[int, ...]
    constants: Mapping[str, int | bool | str]
    warps: int
    stages: int


def launch(given: Launch, *, capability: int | None = None) -> jax.Array:
    """Runs the kernel as a part of a JAX program.

    Args:
      given: the kernel and its arguments.
      capability: of the GPU to compile for, 80, 90, ...; None: of the one that is there.

    Raises:
      ImportError: jax-triton is not installed, or there is no CUDA for it.
    """
    try:
        import jax_triton  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"`implementation` is 'triton', which needs jax-triton and CUDA ({error}): install "
            "qmoe-jax[cuda], or choose 'pallas' or 'xla'"
        ) from error
    # jax-triton 0.4 renamed it.
    parameters = inspect.signature(jax_triton.triton_call).parameters
    out = "out_type" if "out_type" in parameters else "out_shape"
    return jax_triton.triton_call(
        *given.arguments,
        kernel=given.kernel,
        grid=given.grid,
        num_warps=given.warps,
        num_stages=given.stages,
        compute_capability=capability,
        **{out: given.output},
        **given.constants,
    )
