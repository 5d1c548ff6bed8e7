# SPDX-License-Identifier: Apache-2.0
"""The errors that readers and writers of checkpoints raise."""

_FIRST, _LAST = 1200, 400  # characters


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written: names the file, what is wrong and what to do.

    Of a message that quotes a damaged file at length, the middle is left out.
    """

    def __init__(self, message: str):
        too_long = len(message) > _FIRST + _LAST
        super().__init__(f"{message[:_FIRST]} ... {message[-_LAST:]}" if too_long else message)


class NoCheckpointError(CheckpointError):
    """No checkpoint of the expected format lies there; perhaps one of another."""
