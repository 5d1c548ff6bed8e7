# SPDX-License-Identifier: Apache-2.0
"""Quantization grids and GPTQ."""
