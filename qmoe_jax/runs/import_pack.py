# SPDX-License-Identifier: Apache-2.0
"""Makes a packed checkpoint of a published pack, or of an Orbax checkpoint that `export` wrote."""

import functools
import pathlib

import rich.console

from qmoe_jax.checkpoints import (
    array_files,
    formats,
    orbax_pack,
    packed,
    published,
    published_import,
    remote,
    vocabulary,
)
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.runs import progress


def import_pack(
    checkpoint_path: str,
    output_dir: str,
    *,
    experts_per_group: int = published_import.EXPERTS_PER_GROUP,
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
    if experts_per_group < 1:
        raise ValueError(f"EXPERTS_PER_GROUP is {experts_per_group}; expected 1 or more")
    output = array_files.local_folder(output_dir)
    packed.check_free(output)
    folder = pathlib.Path(checkpoint_path)
    match formats.detect(folder):
        case "orbax":
            opened = orbax_pack.open_checkpoint(folder)
            commits = len(opened.manifest["entries"])
            write = functools.partial(orbax_pack.import_checkpoint, opened, output)
        case "published":
            checkpoint = published.open_checkpoint(folder)
            published.check_layers(checkpoint)
            commits = published_import.num_commits(checkpoint, experts_per_group)
            write = functools.partial(
                published_import.import_checkpoint,
                checkpoint,
                output,
                experts_per_group=experts_per_group,
            )
        case "packed":
            raise CheckpointError(f"{folder} is a packed checkpoint already: nothing to import")
        case _:
            raise CheckpointError(
                f"{folder} is neither a pack of the published code (no `{published.PARAMS}`) nor a "
                "packed checkpoint in Orbax's form; T5X and Hugging Face checkpoints need no "
                "import, give them to compress, eval or export."
            )
    if dry_run:
        console.print("dry run: inputs are sound, nothing was written")
        return
    with progress.showing(float(commits), console) as bar:
        committed = functools.partial(progress.committed, bar)
        store = write(committed=committed)
    vocabulary.copy(folder, output)
    console.print(f"{output}: {store.nbytes:,} bytes", soft_wrap=True)
