# SPDX-License-Identifier: Apache-2.0
"""The vocabulary inside of a packed checkpoint, which can then be run from its folder alone."""

import os
import pathlib

from qmoe_jax.checkpoints import array_files, remote

FILE = "sentencepiece.model"


def keep(model: bytes, folder: pathlib.Path) -> None:
    """Puts a vocabulary (`Tokenizer.model`) into `folder`.

    Raises:
      CheckpointError: the disk is full or cannot be written.
    """
    with array_files.replacing(folder / FILE) as file:
        file.write(model)


def copy(source: pathlib.Path, destination: pathlib.Path) -> None:
    """Takes the vocabulary along to another folder, if there is one.

    Raises:
      CheckpointError: the disk is full or cannot be written.
    """
    if (source / FILE).exists():
        keep((source / FILE).read_bytes(), destination)


def kept(checkpoint: str | os.PathLike[str]) -> str:
    """The vocabulary's file in a checkpoint's folder.

    Raises:
      ValueError: there is none.
    """
    found = pathlib.Path(checkpoint, FILE)
    if remote.is_url(checkpoint) or not found.exists():
        raise ValueError(
            f"{checkpoint} holds no {FILE}: give SENTENCEPIECE_MODEL_FILE "
            "(`sentencepiece_model_file`), the vocabulary that the model was trained with"
        )
    return str(found)
