# SPDX-License-Identifier: Apache-2.0
"""The package imports and tells its version."""

import importlib.metadata

import qmoe_jax


def test_version_is_the_installed_one():
    assert importlib.metadata.version("qmoe-jax") == qmoe_jax.__version__
