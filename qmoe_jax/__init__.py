# SPDX-License-Identifier: Apache-2.0
"""Sub-1-bit compression and inference of Mixture-of-Experts models in JAX."""

__version__ = "0.1.0"
