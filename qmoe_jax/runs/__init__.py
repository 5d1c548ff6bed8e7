# SPDX-License-Identifier: Apache-2.0
"""Run modes: the only files that own the clock, the log and the disk."""
