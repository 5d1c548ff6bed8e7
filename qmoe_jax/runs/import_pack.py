# SPDX-License-Identifier: Apache-2.0
"""Makes a packed checkpoint of a pack that the QMoE authors published."""

import pathlib

import rich.console

from qmoe_jax.checkpoints import packed, published


def import_pack(
    checkpoint_path: str,
    output_dir: str,
    *,
    experts_per_group: int = published.EXPERTS_PER_GROUP,
    dry_run: bool = False,
    console: rich.console.Console | None = None,
) -> None:
    """Imports a published pack, word for word.

    Args:
      checkpoint_path: its folder: `config.json`, `noexp.pt`, `exp00.pt` and so on, `sizes.pt`.
      output_dir: a new folder for the packed checkpoint.
      experts_per_group: stored, and later read, together.
      dry_run: check every file's list of tensors and stop.
      console: where progress goes; None: standard output.

    Raises:
      ValueError: a damaged pack, or a folder that is not free (CheckpointError); a setting that
        cannot be.
    """
    console = console or rich.console.Console()
    source, output = pathlib.Path(checkpoint_path), pathlib.Path(output_dir)
    if dry_run:
        packed.check_free(output)
        published.check_layers(published.open_checkpoint(source))
        console.print("dry run: inputs are sound, nothing was written")
        return
    store = published.import_checkpoint(
        source, output, experts_per_group=experts_per_group, console=console
    )
    console.print(f"{output}: {store.nbytes:,} bytes", soft_wrap=True)
