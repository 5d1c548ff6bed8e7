# SPDX-License-Identifier: Apache-2.0
"""Pre-trains a Switch Transformer on span corruption, or trains one further.

The model is that of all other runs; its checkpoints are T5X's. A run whose folder holds the state
of an earlier one goes on from it, sample by sample as if it had never stopped.
"""

import dataclasses
import math
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.console

from qmoe_jax.calibration import pipeline, text, tokenizer
from qmoe_jax.checkpoints import array_files
from qmoe_jax.models import dtypes
from qmoe_jax.models.config import SwitchConfig
from qmoe_jax.models.routing import Capacity
from qmoe_jax.runs import curves, devices, progress, saves, starts
from qmoe_jax.runs.curves import Curve, Series
from qmoe_jax.runs.progress import Progress
from qmoe_jax.runs.starts import Start
from qmoe_jax.training import batches, program
from qmoe_jax.training.batches import Batch, TrainingText
from qmoe_jax.training.loss import Loss, Metrics
from qmoe_jax.training.optimizer import Optimizer
from qmoe_jax.training.program import Program, Recipe
from qmoe_jax.training.step import TrainState

READ_AHEAD = 2  # batches


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where training runs, and in what.

    Attributes:
      activation_dtype: None: bfloat16 where the device computes in it. Parameters are float32.
      num_expert_partitions: that experts are spread over; None: as many as divide both the devices
        and the experts. The other devices' axis is that of the data.
    """

    activation_dtype: str | None = None
    num_expert_partitions: int | None = None


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What is written when; periods are in steps.

    Attributes:
      save_period: of checkpoints, the state and the loss curve; all are written at the end, too.
      keep_checkpoints: the newest so many; None: all.
      save_dtype: of checkpoints, "float32" or "bfloat16".
      eval_period: of the validation loss.
      log_period: of a point of the loss curve.
    """

    save_period: int = 1000
    keep_checkpoints: int | None = None
    save_dtype: str = "float32"
    eval_period: int = 1000
    log_period: int = 50

    def __post_init__(self):
        for name in ("save_period", "eval_period", "log_period", "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.upper()} is {value}; expected 1 or more")
        dtypes.float_dtype(self.save_dtype, "SAVE_DTYPE")


@dataclasses.dataclass(frozen=True)
class Run:
    """What all steps of one run share."""

    model_dir: pathlib.Path
    program: Program
    outputs: Outputs
    settings: Mapping[str, Any]
    validation: tuple[Batch, ...]
    curve: Curve
    shown: Progress


def train(
    model: SwitchConfig,
    model_dir: str,
    text_options: TrainingText,
    train_steps: int,
    *,
    batch_size: int = 128,
    optimizer: Optimizer = Optimizer(),  # noqa: B008, frozen
    loss: Loss = Loss(),  # noqa: B008
    outputs: Outputs = Outputs(),
    machine: Machine = Machine(),
    capacity: Capacity = "none",
    initial_checkpoint_path: str | None = None,
    num_validation_samples: int = 128,
    random_seed: int = 0,
    dry_run: bool = False,
    console: rich.console.Console | None = None,
) -> dict[str, Series]:
    """Trains up to step `train_steps`, from nothing, a checkpoint or where `model_dir` stands.

    Args:
      model: sizes and dropout rates.
      model_dir: folder for checkpoints, the state and the loss curve (T5X: MODEL_DIR).
      text_options: the text, its tokenizer, the seed of its order and noise.
      train_steps: the last step; those of `initial_checkpoint_path` count, as in T5X.
      batch_size: samples of one step, over all devices.
      optimizer: the optimizer and its schedule.
      loss: factors of the loss.
      outputs: what is written when.
      machine: device mesh and dtype.
      capacity: "none" drops no token, "t5x" drops as T5X does in training.
      initial_checkpoint_path: a T5X checkpoint to take the parameters from.
      num_validation_samples: of `text_options.validation_files`, where there are some.
      random_seed: of the first parameters and of dropout.
      dry_run: check the inputs and stop.
      console: where progress goes; None: standard output.

    Returns:
      The series of the loss curve: `steps`, `loss`, `cross_entropy` and so on.

    Raises:
      ValueError: a setting that cannot be, too little text, a loss that is not finite, a state of
        other settings; a checkpoint that cannot be read or written (CheckpointError).
    """
    console = console or rich.console.Console()
    folder = array_files.local_folder(model_dir)
    recipe = Recipe(model, optimizer, loss, train_steps, batch_size, capacity, random_seed)
    validation = _validation_batches(text_options, recipe, num_validation_samples)
    settings = starts.settings(recipe, text_options)
    start = starts.find(folder, settings, initial_checkpoint_path, model)
    if starts.is_finished(start, folder, train_steps):
        console.print(f"{folder} is at step {start.step:,} already: nothing to do", soft_wrap=True)
        return curves.load(folder, start.step).series
    built = program.build(
        recipe,
        dtype=dtypes.activation_dtype(machine.activation_dtype),
        first_step=start.first,
        partitions=machine.num_expert_partitions,
    )
    stream = _training_batches(text_options, recipe, start.step - start.first)
    console.print(_opening(built, start, folder), soft_wrap=True)
    if dry_run:
        next(stream)  # shows whether there is text
        console.print("dry run: inputs are sound, nothing was written")
        return {}
    starts.make_folder(folder)
    state = starts.first_state(built, folder, start, initial_checkpoint_path)
    curve = curves.load(folder, start.step) if start.resumed else curves.empty()
    with (
        pipeline.read_ahead(stream, READ_AHEAD) as ahead,
        progress.showing(float(max(train_steps - start.step, 0)), console) as shown,
    ):
        saved_with = settings | {starts.FIRST_STEP: start.first}
        run = Run(folder, built, outputs, saved_with, validation, curve, shown)
        if start.resumed:  # it may have been stopped between the state and its checkpoint
            _save_checkpoint(run, start.step, state)
        _steps(run, state, range(start.step + 1, train_steps + 1), ahead)
    return curve.series


def _validation_batches(
    text_options: TrainingText, recipe: Recipe, number: int
) -> tuple[Batch, ...]:
    """Also checks the options of the text, whether there is validation or not."""
    if not text_options.files:
        raise ValueError(
            "TRAIN_FILES is not set; expected text or JSON-lines files, a folder, a glob or "
            "task:NAME of SeqIO"
        )
    if text_options.validation_files == text_options.files:
        raise ValueError("VALIDATION_FILES and TRAIN_FILES are the same text: give other text")
    number = 0 if text_options.validation_files is None else number
    samples = text.load(text_options, recipe.model.vocab_size, 0, number).validation
    if samples is None:
        return ()
    # Of T5's noise, whatever that of training is: the targets have a length of their own.
    shape = batches.lengths(text_options)._replace(targets=int(samples.decoder_lengths.max()))
    return tuple(batches.batched(samples, recipe.batch_size, shape))


def _training_batches(
    text_options: TrainingText, recipe: Recipe, batches_done: int
) -> Iterator[Batch]:
    vocabulary = tokenizer.load_tokenizer(
        text_options.sentencepiece_model_file, text_options.extra_ids
    )
    first_sample = batches_done * recipe.batch_size
    samples = batches.training_samples(text_options, vocabulary, first_sample)
    return batches.batched(samples, recipe.batch_size, batches.lengths(text_options))


def _opening(built: Program, start: Start, folder: pathlib.Path) -> str:
    parameters = sum(leaf.size for leaf in jax.tree.leaves(built.state.params))
    rows, partitions = built.mesh.devices.shape
    what = f"resumes {folder} at step {start.step:,}" if start.resumed else "trains"
    return (
        f"{what}: {parameters:,} parameters, to step {built.recipe.train_steps:,}; "
        f"{devices.description()}, {rows} data x {partitions} expert partitions"
    )


def _steps(run: Run, state: TrainState, steps: range, stream: Iterator[Batch]) -> None:
    """All steps; the next one is dispatched before the metrics of the last are waited for."""
    since: list[dict[str, float]] = []  # metrics since the last point of the curve
    waiting = None
    tokens, begun = 0, time.perf_counter()
    for step, batch in zip(steps, stream, strict=False):
        state, metrics = run.program.train_step(state, program.on_devices(run.program, batch))
        tokens += _tokens(batch)
        if waiting:
            since.append(_fetch(run, *waiting))
        waiting = (step, metrics)
        due = _due(run.outputs, step, steps[-1])
        if not any(due):
            continue
        since.append(_fetch(run, *waiting))
        waiting = None
        now = time.perf_counter()
        if due.point:
            curves.add(run.curve, step, since, now - begun, tokens)
            _show(run, step, len(since), tokens, now - begun)
            since, tokens, begun = [], 0, now
        if due.validation and run.validation:
            _validate(run, step, state)
        if due.save:
            _save(run, step, state)
        begun += time.perf_counter() - now  # what these took is no training


class _Due(NamedTuple):
    point: bool
    validation: bool
    save: bool


def _due(outputs: Outputs, step: int, last_step: int) -> _Due:
    def falls(period: int) -> bool:
        return step == last_step or step % period == 0

    save = falls(outputs.save_period)
    return _Due(save or falls(outputs.log_period), falls(outputs.eval_period), save)


def _tokens(batch: Batch) -> int:
    read = (batch.encoder_input_tokens, batch.decoder_target_tokens)
    return sum(int(np.count_nonzero(tokens)) for tokens in read)


def _fetch(run: Run, step: int, metrics: Metrics) -> dict[str, float]:
    """The metrics of a step as numbers; one that is not finite ends the run, before any save."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    for name in ("loss", "gradient_norm", "parameter_norm"):
        if not math.isfinite(values[name]):
            kept = saves.checkpoint_steps(run.model_dir)
            state = f"that of step {kept[-1]:,} is intact" if kept else "none was saved before"
            raise ValueError(
                f"the {name.replace('_', ' ')} of step {step:,} is {values[name]}; no checkpoint "
                f"was made of it, {state}: lower LEARNING_RATE, raise WARMUP_STEPS or set "
                "MAX_GRAD_NORM"
            )
    return values


def _show(run: Run, step: int, steps: int, tokens: int, seconds: float) -> None:
    loss = run.curve.series["loss"][-1]
    where = f"step {step:,}: loss {loss:.4f}"
    progress.advance(run.shown, float(steps), where, tokens, seconds)
    rate = tokens / max(seconds, 1e-9)
    progress.line(run.shown, f"{where}, {rate:,.0f} tokens/s")


def _validate(run: Run, step: int, state: TrainState) -> None:
    with progress.timed(run.shown, "validation"):
        loss = program.evaluate(run.program, state.params, run.validation)
    curves.add_validation(run.curve, step, loss)
    run.shown.console.print(f"step {step:,}: validation loss {loss:.4f}", soft_wrap=True)


def _save(run: Run, step: int, state: TrainState) -> None:
    """The curve first and the checkpoint last: a resumed run cuts the one, and makes up the other.

    (The curve may be ahead of the state, never behind it; a state without its checkpoint is enough
    to write it.)
    """
    with progress.timed(run.shown, "saving"):
        curves.save(run.model_dir, run.curve, run.settings, devices.description())
        saves.save_state(run.model_dir, step, state, run.settings)
        _save_checkpoint(run, step, state)


def _save_checkpoint(run: Run, step: int, state: TrainState) -> None:
    dtype = dtypes.float_dtype(run.outputs.save_dtype, "SAVE_DTYPE")
    saves.save_checkpoint(run.model_dir, step, state.params, dtype)
    saves.keep_newest(run.model_dir, run.outputs.keep_checkpoints)
