# SPDX-License-Identifier: Apache-2.0
"""Defaults of the run modes."""
