# SPDX-License-Identifier: Apache-2.0
"""The dtypes that the model can compute in."""

import jax
import ml_dtypes
import numpy as np


def activation_dtype(name: str | None) -> np.dtype:
    """The dtype asked for; by default bfloat16 where the device multiplies in it, else float32.

    Raises:
      ValueError: neither bfloat16 nor float32.
    """
    if name is None:
        device = jax.devices()[0]
        capability = getattr(device, "compute_capability", None)  # "8.0" on NVIDIA GPUs
        slow = device.platform == "cpu" or (capability and float(capability) < 8)
        name = "float32" if slow else "bfloat16"
    return float_dtype(name, "ACTIVATION_DTYPE")


def float_dtype(name: str, setting: str) -> np.dtype:
    """bfloat16 or float32 by name.

    Raises:
      ValueError: another name.
    """
    dtypes = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
    if name not in dtypes:
        raise ValueError(f"{setting} is {name!r}; expected 'bfloat16' or 'float32'")
    return dtypes[name]
