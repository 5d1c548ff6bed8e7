# SPDX-License-Identifier: Apache-2.0
"""Which format lies at a path: told by its files, not asked for."""

import os
import pathlib
from typing import Literal, TypeAlias

from qmoe_jax.checkpoints import huggingface, kvstore, orbax_pack, packed, published, remote, t5x
from qmoe_jax.checkpoints.errors import CheckpointError, NoCheckpointError

Format: TypeAlias = Literal["packed", "published", "orbax", "huggingface", "t5x"]

# Files that tell the formats which are read from local folders alone; the first one found counts.
_LOCAL_FORMATS = {
    packed.MANIFEST: "a packed checkpoint",
    published.SIZES: "a pack of the published QMoE code",
    "config.json": "a Hugging Face folder",
}


def detect(path: str | os.PathLike[str]) -> Format:
    """The format of a local folder; "t5x" of what looks like no other, and of every URL.

    "orbax" is our packed checkpoint in Orbax's form; T5X's own use of Orbax is "t5x".
    """
    if remote.is_url(path):
        return "t5x"
    folder = pathlib.Path(path)
    if packed.is_packed(folder):
        return "packed"
    if published.is_published(folder):
        return "published"
    if orbax_pack.is_orbax_pack(folder):
        return "orbax"
    if huggingface.is_huggingface(folder):
        return "huggingface"
    return "t5x"


def open_t5x(path: str | os.PathLike[str]) -> t5x.T5xCheckpoint:
    """`t5x.open_checkpoint`; where a URL holds another format, the error says so.

    Raises:
      CheckpointError: no T5X checkpoint, or a damaged one.
    """
    try:
        return t5x.open_checkpoint(path)
    except NoCheckpointError as error:
        if not remote.is_url(path):
            raise
        store = kvstore.open_store(kvstore.location(path))
        contents = kvstore.read_files(store, list(_LOCAL_FORMATS))
        for content, name in zip(contents, _LOCAL_FORMATS.values(), strict=True):
            if content is not None:
                raise CheckpointError(
                    f"{path} is {name}: copy it to a local folder first, and give that folder's "
                    "path"
                ) from error
        raise
