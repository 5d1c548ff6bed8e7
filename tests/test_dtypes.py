# SPDX-License-Identifier: Apache-2.0
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qmoe_jax.models import dtypes


def test_a_cpu_computes_in_float32_unless_told_otherwise():
    assert dtypes.activation_dtype(None) == np.float32
    assert dtypes.activation_dtype("bfloat16") == jnp.bfloat16
    with pytest.raises(ValueError, match="ACTIVATION_DTYPE is 'float64'"):
        dtypes.activation_dtype("float64")


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [("gpu", "7.5", np.float32), ("gpu", "8.0", jnp.bfloat16), ("tpu", None, jnp.bfloat16)],
)
def test_bfloat16_where_the_device_multiplies_in_it(monkeypatch, platform, capability, expected):
    """A T4 (7.5) holds bfloat16, but does not compute in it."""
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert dtypes.activation_dtype(None) == expected
