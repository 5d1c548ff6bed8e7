# SPDX-License-Identifier: Apache-2.0
"""Calls Triton kernels through jax-triton."""

import dataclasses
import inspect
import os
from collections.abc import Mapping
from typing import Any

import jax

FP_FUSION = True  # a product and a sum may become one multiply-add, as in XLA and Pallas


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
    jax_triton = library()
    parameters = inspect.signature(jax_triton.triton_call).parameters
    options: dict[str, Any] = {"out_shape": given.output, "enable_fp_fusion": FP_FUSION}
    if "out_type" in parameters:  # from 0.4 on
        options = {
            "out_type": given.output,
            "backend_options": {"enable_fp_fusion": FP_FUSION},
        }
    return jax_triton.triton_call(
        *given.arguments,
        kernel=given.kernel,
        grid=given.grid,
        num_warps=given.warps,
        num_stages=given.stages,
        compute_capability=capability,
        **options,
        **given.constants,
    )


def library() -> Any:
    """The module `jax_triton`.

    Raises:
      ImportError: it is not installed, there is no CUDA for it, or it fails under this JAX.
    """
    cache = os.environ.get("TRITON_CACHE_DIR")
    try:
        import jax_triton  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"`implementation` is 'triton', which needs jax-triton and CUDA ({error}): install "
            "qmoe-jax[cuda], or choose 'pallas' or 'xla'"
        ) from error
    finally:
        # jax-triton 0.3 empties it, and Triton's own compiler then finds no folder.
        os.environ.pop("TRITON_CACHE_DIR", None)
        if cache is not None:
            os.environ["TRITON_CACHE_DIR"] = cache
    if jax.__version_info__ >= (0, 12) and jax_triton.__version__ in ("0.4.0", "0.4.1"):
        raise ImportError(
            f"jax-triton {jax_triton.__version__} does not run under JAX {jax.__version__}: "
            "install another of either, or choose 'pallas' or 'xla' for `implementation`"
        )
    return jax_triton
