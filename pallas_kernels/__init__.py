# SPDX-License-Identifier: Apache-2.0
"""Kernels on packed experts: arrays in, arrays out."""
