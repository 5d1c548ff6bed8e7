# SPDX-License-Identifier: Apache-2.0
"""Where a training begins: anew, from the parameters of a checkpoint, or where it was stopped."""

import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from qmoe_jax.checkpoints import source
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.checkpoints.source import Source
from qmoe_jax.models import config as configs
from qmoe_jax.models.config import SwitchConfig
from qmoe_jax.runs import saves
from qmoe_jax.training import batches, program
from qmoe_jax.training.batches import TrainingText
from qmoe_jax.training.optimizer import DECAYING
from qmoe_jax.training.program import Program, Recipe
from qmoe_jax.training.step import TrainState

FIRST_STEP = "FIRST_STEP"  # among a state's settings
NAMES_SHOWN = 3


class Start(NamedTuple):
    """Where a run begins: `first` is the step of the parameters that training began with."""

    first: int
    step: int
    resumed: bool


def settings(recipe: Recipe, text_options: TrainingText) -> dict[str, Any]:
    """What a resumed run must share, as JSON holds it.

    Where files lie and on what the run is made may change, and so may the number of steps, unless
    the learning rate goes by it.
    """
    shared = {
        "MODEL": dataclasses.asdict(recipe.model),
        "OPTIMIZER": dataclasses.asdict(recipe.optimizer),
        "LOSS": dataclasses.asdict(recipe.loss),
        "TRAIN_STEPS": recipe.train_steps if recipe.optimizer.schedule in DECAYING else None,
        "BATCH_SIZE": recipe.batch_size,
        "CAPACITY": recipe.capacity,
        "RANDOM_SEED": recipe.random_seed,
        "SEED": text_options.seed,
        "TASK_FEATURE_LENGTHS": batches.lengths(text_options)._asdict(),
        "DOCUMENT_MODE": text_options.document_mode,
        "NOISE_DENSITY": text_options.noise_density,
        "MEAN_NOISE_SPAN_LENGTH": text_options.mean_noise_span_length,
    }
    return json.loads(json.dumps(shared))


def find(
    folder: pathlib.Path,
    settings: Mapping[str, Any],
    initial_checkpoint_path: str | None,
    model: SwitchConfig,
) -> Start:
    """Where a run with these settings begins; a state in `folder` goes before a checkpoint.

    Raises:
      ValueError: the folder's state came from other settings, the folder holds checkpoints that the
        run would make again, the initial checkpoint has other sizes than the model; a state or
        checkpoint is damaged (CheckpointError).
    """
    saved = saves.newest_state(folder)
    if saved is not None:
        _check_same(folder, saved.settings, settings)
        start = Start(saved.settings[FIRST_STEP], saved.step, True)
    elif initial_checkpoint_path is not None:
        step = _open_initial(initial_checkpoint_path, model).step or 0
        start = Start(step, step, False)
    else:
        start = Start(0, 0, False)
    in_the_way = [
        step for step in saves.checkpoint_steps(folder) if step > start.step or not start.resumed
    ]
    if in_the_way:
        raise ValueError(
            f"MODEL_DIR {folder} holds checkpoint_{in_the_way[-1]}, but no {saves.STATE} of that "
            "step or a later one: choose another folder (INITIAL_CHECKPOINT_PATH goes on from a "
            "checkpoint), or remove it"
        )
    return start


def is_finished(start: Start, folder: pathlib.Path, train_steps: int) -> bool:
    """Whether there is nothing to do: no step to make, no checkpoint to write.

    Raises:
      ValueError: the run would begin at or after its last step.
    """
    if start.step < train_steps:
        return False
    if not start.resumed:
        raise ValueError(
            f"TRAIN_STEPS is {train_steps}; expected more than the {start.step} of "
            "INITIAL_CHECKPOINT_PATH, which count"
        )
    return start.step in saves.checkpoint_steps(folder)


def make_folder(folder: pathlib.Path) -> None:
    """Makes the folder of a run, which must be writable; removes what a killed run left half done.

    Raises:
      CheckpointError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(
            f"MODEL_DIR {folder} cannot be written ({error.strerror}): choose another folder"
        ) from error
    saves.remove_unfinished(folder)


def first_state(
    built: Program, folder: pathlib.Path, start: Start, initial_checkpoint_path: str | None
) -> TrainState:
    """The state to begin with, on the program's devices.

    Raises:
      CheckpointError: the state or the checkpoint is damaged.
    """
    if start.resumed:
        return saves.restore_state(folder, start.step, built.state)
    if initial_checkpoint_path is None:
        return program.new_state(built)
    return program.new_state(built, _initial_params(initial_checkpoint_path, built.recipe.model))


def _check_same(folder: pathlib.Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    was, now = (flatten_dict(dict(settings), sep="/") for settings in (saved, now))
    changed = [
        f"{name} was {was.get(name)!r}, is {value!r}"
        for name, value in now.items()
        if was.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"MODEL_DIR {folder} holds the state of a training with other settings "
            f"({'; '.join(changed)}): set them as they were, or choose another folder"
        )


def _open_initial(path: str, model: SwitchConfig) -> Source:
    opened = source.open_source(path)
    if opened.format == "packed":
        raise ValueError(
            f"INITIAL_CHECKPOINT_PATH {path} is a packed checkpoint; expected one of "
            "T5X's or Hugging Face's"
        )
    found, wanted = configs.param_shapes(opened.config), configs.param_shapes(model)
    other = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if other:
        shown = [f"`{name}` {found.get(name)}, not {wanted.get(name)}" for name in other]
        raise ValueError(
            f"INITIAL_CHECKPOINT_PATH {path} has other sizes than MODEL: "
            f"{'; '.join(shown[:NAMES_SHOWN])}"
        )
    return opened


def _initial_params(path: str, model: SwitchConfig) -> dict[str, Any]:
    opened = _open_initial(path, model)
    arrays = opened.read(list(configs.param_shapes(model)))
    source.check_finite(opened, arrays)
    return unflatten_dict({k: np.asarray(v, np.float32) for k, v in arrays.items()}, sep="/")
