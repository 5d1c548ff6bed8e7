# SPDX-License-Identifier: Apache-2.0
import types

import jax
import pytest

from pallas_kernels import implementation


@pytest.mark.parametrize("choice", ["pallas", "triton", "xla"])
def test_a_choice_is_taken_as_it_is(choice):
    assert implementation.resolve(choice) == choice


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("cpu", "", "xla"),
        ("tpu", "", "xla"),
        ("gpu", "9.0", "pallas"),
        ("gpu", "8.0", "pallas"),
        ("gpu", "7.5", "xla"),
        ("gpu", "gfx942", "xla"),
    ],
)
def test_auto_goes_by_the_device(platform, capability, expected, monkeypatch):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert implementation.resolve("auto") == expected
    assert implementation.available("auto") and implementation.available("xla")
    assert implementation.available("triton") == (expected == "pallas")


def test_others_are_refused():
    with pytest.raises((ValueError, TypeError), match="cuda"):  # tests check types first
        implementation.resolve("cuda")  # pyright: ignore[reportArgumentType]
