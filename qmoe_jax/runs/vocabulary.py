# SPDX-License-Identifier: Apache-2.0
"""The vocabulary inside of a packed checkpoint, which can then be run from its folder alone."""

import pathlib

from qmoe_jax.calibration import tokenizer
from qmoe_jax.calibration.text import Text
from qmoe_jax.checkpoints import array_files


def keep(text: Text, folder: pathlib.Path) -> None:
    """Puts a run's vocabulary, with all its sentinels, into `folder`.

    Raises:
      CheckpointError: the disk is full or cannot be written.
    """
    model = tokenizer.model_bytes(text.sentencepiece_model_file, text.extra_ids)
    with array_files.replacing(folder / tokenizer.FILE) as file:
        file.write(model)


def copy(source: pathlib.Path, destination: pathlib.Path) -> None:
    """Takes the vocabulary along to another folder, if there is one.

    Raises:
      CheckpointError: the disk is full or cannot be written.
    """
    if (source / tokenizer.FILE).exists():
        with array_files.replacing(destination / tokenizer.FILE) as file:
            file.write((source / tokenizer.FILE).read_bytes())
