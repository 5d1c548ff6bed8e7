# SPDX-License-Identifier: Apache-2.0
"""Makes a packed checkpoint of a published pack, or of an Orbax checkpoint that `export` wrote."""

import pathlib

import rich.console

from qmoe_jax.checkpoints import orbax_pack, packed, published, remote
from qmoe_jax.checkpoints.errors import CheckpointError


def import_pack(
    checkpoint_path: str,
    output_dir: str,
    *,
    experts_per_group: int = published.EXPERTS_PER_GROUP,
    dry_run: bool = False,
    console: rich.console.Console | None = None,
) -> None:
    """Imports a published pack, or an exported Orbax checkpoint, word for word.

    Args:
      checkpoint_path: the pack's folder: `config.json`, `noexp.pt`, `exp00.pt` and so on,
        `sizes.pt`; or the Orbax checkpoint.
      output_dir: a new folder for the packed checkpoint.
      experts_per_group: stored, and later read, together; what comes from an Orbax checkpoint keeps
        the groups it had.
      dry_run: check every list of arrays and stop.
      console: where progress goes; None: standard output.

    Raises:
      ValueError: a damaged input, or a folder that is not free (CheckpointError); a setting that
        cannot be.
    """
    console = console or rich.console.Console()
    if remote.is_url(checkpoint_path):
        raise CheckpointError(
            f"{checkpoint_path}: `import` reads local folders alone, copy it to one"
        )
    source, output = pathlib.Path(checkpoint_path), pathlib.Path(output_dir)
    is_orbax = orbax_pack.is_orbax_pack(source)
    if dry_run:
        packed.check_free(output)
        if is_orbax:
            orbax_pack.open_checkpoint(source)
        else:
            published.check_layers(published.open_checkpoint(source))
        console.print("dry run: inputs are sound, nothing was written")
        return
    if is_orbax:
        store = orbax_pack.import_checkpoint(source, output, console=console)
    else:
        store = published.import_checkpoint(
            source, output, experts_per_group=experts_per_group, console=console
        )
    console.print(f"{output}: {store.nbytes:,} bytes", soft_wrap=True)
