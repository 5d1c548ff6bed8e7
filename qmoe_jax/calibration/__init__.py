# SPDX-License-Identifier: Apache-2.0
"""Calibration text, token buffers and the walk over one block."""
