# SPDX-License-Identifier: Apache-2.0
"""Tests for several devices: run again, in a process whose CPU is several devices."""

import os
import subprocess
import sys
from typing import Any

import jax
import pytest


def first(number: int) -> list[Any]:
    """The first devices; the test is skipped where there are not so many."""
    if len(jax.devices()) < number:
        pytest.skip(f"needs {number} devices; a test of this file provides them")
    return jax.devices()[:number]


def run_again(file: str, number: int) -> None:
    """Runs a test file on `number` devices; the test that calls this is the one skipped there."""
    if len(jax.devices()) >= number:
        pytest.skip("the other tests run on these devices")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={number}"
    flags += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 skipped" in done.stdout, done.stdout
