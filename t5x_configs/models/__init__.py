# SPDX-License-Identifier: Apache-2.0
"""Sizes of the released models."""
