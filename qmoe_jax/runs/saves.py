# SPDX-License-Identifier: Apache-2.0
"""What a training leaves on disk: checkpoints that T5X reads, and the state that it resumes from.

`checkpoint_{step}` holds the parameters in T5X's classic layout; `train_state` the newest whole
state, written by Orbax together with the settings it came from. Both appear complete or not at all.
"""

import contextlib
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from qmoe_jax.checkpoints import kvstore, orbax_logging, t5x_writer
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.training.step import TrainState

STATE = "train_state"
_CHECKPOINT = re.compile(r"checkpoint_(\d+)")


class Saved(NamedTuple):
    """A state on disk."""

    step: int
    settings: dict[str, Any]


def newest_state(model_dir: pathlib.Path) -> Saved | None:
    """The state to resume from, without its arrays; None where there is none.

    Raises:
      CheckpointError: it is damaged.
    """
    if not (model_dir / STATE).is_dir():
        return None
    with _managed(model_dir) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        found = manager.restore(step, args=ocp.args.Composite(settings=ocp.args.JsonRestore()))
        return Saved(step, found["settings"])


def restore_state(model_dir: pathlib.Path, step: int, like: TrainState) -> TrainState:
    """Reads the state; `like` has its shapes, dtypes and shardings (`jax.ShapeDtypeStruct`).

    Raises:
      CheckpointError: it is damaged.
    """
    with _managed(model_dir) as manager:
        restored = manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like))
        )
        return restored["state"]


def save_state(
    model_dir: pathlib.Path, step: int, state: TrainState, settings: Mapping[str, Any]
) -> None:
    """Writes the state, then removes the one before.

    Raises:
      CheckpointError: it cannot be written.
    """
    with _managed(model_dir, writes=True) as manager:
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), settings=ocp.args.JsonSave(dict(settings))
            ),
        )


@contextlib.contextmanager
def _managed(model_dir: pathlib.Path, writes: bool = False) -> Iterator[ocp.CheckpointManager]:
    folder = model_dir.absolute() / STATE
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1,
        create=writes,
        cleanup_tmp_directories=writes,
        enable_async_checkpointing=False,
    )
    try:
        with orbax_logging.silenced(), ocp.CheckpointManager(folder, options=options) as manager:
            yield manager
    except kvstore.FAILURES as error:
        raise CheckpointError(_trouble(folder, error, writes)) from error


def _trouble(folder: pathlib.Path, error: Exception, writes: bool) -> str:
    reason = kvstore.reason(error)
    if writes:
        return (
            f"{folder} cannot be written ({reason}): free space on that disk (or let it be "
            "written) and run the same command again; what was saved before is intact."
        )
    return (
        f"{folder} cannot be read ({reason}): restore it from a copy, or train on from the last "
        "checkpoint_* beside it (INITIAL_CHECKPOINT_PATH) into another folder."
    )


def save_checkpoint(
    model_dir: pathlib.Path, step: int, params: Mapping[str, Any], dtype: np.dtype
) -> None:
    """Writes `checkpoint_{step}`, unless it is there.

    Raises:
      CheckpointError: it cannot be written.
    """
    if step in checkpoint_steps(model_dir):
        return
    arrays = {path: np.asarray(leaf) for path, leaf in flatten_dict(dict(params), sep="/").items()}
    t5x_writer.save(model_dir, arrays, step, dtype)


def checkpoint_steps(model_dir: pathlib.Path) -> list[int]:
    """The steps of the checkpoints in a folder, ascending."""
    names = [path.name for path in model_dir.iterdir()] if model_dir.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name)))


def keep_newest(model_dir: pathlib.Path, number: int | None) -> None:
    """Removes all checkpoints but the newest; None: none of them."""
    if number is not None:
        for step in checkpoint_steps(model_dir)[:-number]:
            path = model_dir / f"checkpoint_{step}"
            # Under its own name it must be whole.
            shutil.rmtree(path.rename(path.with_name(f"{path.name}.tmp-removed")))


def remove_unfinished(model_dir: pathlib.Path) -> None:
    """Removes what a run that was killed had begun to write or to remove."""
    for path in model_dir.glob("checkpoint_*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
