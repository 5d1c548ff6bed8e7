# SPDX-License-Identifier: Apache-2.0
"""Flax Linen modules whose parameter tree is the T5X tree."""
