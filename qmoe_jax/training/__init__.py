# SPDX-License-Identifier: Apache-2.0
"""Pre-training: batches, loss, optimizer, devices, the step."""
