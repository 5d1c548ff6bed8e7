# SPDX-License-Identifier: Apache-2.0
"""The one error that readers and writers of checkpoints raise."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written: names the file, what is wrong and what to do."""
