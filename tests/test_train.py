# SPDX-License-Identifier: Apache-2.0
"""The run mode from end to end: a tiny model, a few steps."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
import rich.console
import tiny_training

from qmoe_jax.checkpoints import t5x, t5x_writer
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.models import config as configs
from qmoe_jax.runs import evaluate, saves, train
from qmoe_jax.runs.train import Outputs
from qmoe_jax.training.optimizer import Optimizer

OUTPUTS = Outputs(save_period=3, eval_period=3, log_period=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny_training.text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    """Six steps in one go: the folder, the curve, what was shown."""
    folder = tmp_path_factory.mktemp("straight") / "model"
    console = rich.console.Console(file=io.StringIO(), width=200)
    curve = run(folder, text, console=console)
    return folder, curve, shown_by(console)


def shown_by(console: rich.console.Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def run(folder, text, train_steps=6, **changes):
    options = {
        "model": tiny_training.DROPPING,
        "optimizer": tiny_training.OPTIMIZER,
        "batch_size": 8,
        "outputs": OUTPUTS,
        "num_validation_samples": 11,
        "console": rich.console.Console(file=io.StringIO(), width=200),
    }
    return train.train(
        model_dir=str(folder), text_options=text, train_steps=train_steps, **(options | changes)
    )


def parameters(folder, step: int) -> dict[str, np.ndarray]:
    checkpoint = t5x.open_checkpoint(folder / f"checkpoint_{step}")
    return dict(t5x.read_many(checkpoint, list(checkpoint.leaves)))


def assert_same_training(folder, other, steps=(3, 6)):
    for step in steps:
        left, right = parameters(folder, step), parameters(other, step)
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_array_equal(left[name], right[name], err_msg=f"{step}: {name}")
    curves = [json.loads((path / "loss_curve.json").read_text()) for path in (folder, other)]
    for name in ("steps", "loss", "accuracy", "validation", "tokens_seen"):
        assert curves[0][name] == curves[1][name], name


def test_it_leaves_checkpoints_a_state_and_a_curve(straight):
    folder, curve, shown = straight
    names = {path.name for path in folder.iterdir()}
    saved = {"checkpoint_3", "checkpoint_6", "train_state", "loss_curve.json", "loss_curve.png"}
    assert names == saved
    assert curve["steps"] == [2, 3, 4, 6]  # at each save, too
    assert curve["loss"][-1] < curve["loss"][0]
    assert curve["learning_rate"][-1] == pytest.approx(0.05)
    file = json.loads((folder / "loss_curve.json").read_text())
    assert file["validation"]["steps"] == [3, 6]
    assert file["loss"] == curve["loss"]
    assert file["settings"]["BATCH_SIZE"] == 8
    assert "step 3: validation loss" in shown and "(100% done" in shown and "tokens/s" in shown
    read = parameters(folder, 6)
    assert {k: v.shape for k, v in read.items()} == configs.param_shapes(tiny_training.DROPPING)
    assert {array.dtype.name for array in read.values()} == {"float32"}


def test_validation_is_what_eval_finds(straight, text):
    folder, _, _ = straight
    file = json.loads((folder / "loss_curve.json").read_text())
    result = evaluate.evaluate(
        str(folder / "checkpoint_6"),
        text,
        num_validation_samples=11,
        console=rich.console.Console(file=io.StringIO()),
    )
    assert result["loss"] == pytest.approx(file["validation"]["loss"][-1], rel=1e-5)


def test_a_stopped_training_goes_on_as_if_it_never_had(straight, text, tmp_path):
    run(tmp_path, text, train_steps=3)
    console = rich.console.Console(file=io.StringIO(), width=200)
    jax.clear_caches()
    run(tmp_path, text, console=console)
    assert "at step 3" in shown_by(console)
    assert_same_training(tmp_path, straight[0])


@pytest.mark.parametrize(
    "place",
    [
        "qmoe_jax.runs.saves.save_state",  # the curve is ahead of the state
        "qmoe_jax.checkpoints.t5x_writer.save",  # the state is ahead of its checkpoint
    ],
)
def test_a_training_killed_while_it_saves_loses_nothing_saved(
    place, straight, text, tmp_path, monkeypatch
):
    module, _, name = place.rpartition(".")
    owner = {"qmoe_jax.runs.saves": saves, "qmoe_jax.checkpoints.t5x_writer": t5x_writer}[module]
    real, calls = getattr(owner, name), []

    def killed_the_second_time(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(owner, name, killed_the_second_time)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, text)
    assert saves.checkpoint_steps(tmp_path) == [3]
    run(tmp_path, text)
    assert_same_training(tmp_path, straight[0])


def test_a_finished_training_is_left_alone(straight, text):
    folder, curve, _ = straight
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    console = rich.console.Console(file=io.StringIO(), width=200)
    assert run(folder, text, console=console) == curve
    assert "is at step 6 already: nothing to do" in shown_by(console)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_checkpoint_is_trained_further(straight, text, tmp_path):
    """Its steps count, its parameters are the first ones, the text begins anew."""
    initial = str(straight[0] / "checkpoint_6")
    outputs = Outputs(save_period=1, keep_checkpoints=1, save_dtype="bfloat16", eval_period=1)
    curve = run(tmp_path, text, 8, initial_checkpoint_path=initial, outputs=outputs)
    assert curve["steps"] == [7, 8]
    assert saves.checkpoint_steps(tmp_path) == [8]
    assert {array.dtype.name for array in parameters(tmp_path, 8).values()} == {"bfloat16"}
    again = tmp_path / "again"
    run(again, text, 7, initial_checkpoint_path=initial, outputs=outputs)
    run(again, text, 8, initial_checkpoint_path=initial, outputs=outputs)
    assert_same_training(tmp_path, again, steps=(8,))


def test_dry_run_writes_nothing(text, tmp_path):
    console = rich.console.Console(file=io.StringIO(), width=200)
    assert run(tmp_path / "new", text, dry_run=True, console=console) == {}
    shown = shown_by(console)
    assert "dry run: inputs are sound" in shown
    assert "parameters, to step 6; 1 x cpu, 1 data x 1 expert partitions" in shown
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_ends_the_run(text, tmp_path):
    wild = Optimizer("adafactor", "constant", 1e30, 0)
    with pytest.raises(ValueError, match=r"of step \d+ is (nan|inf); no .*LEARNING_RATE"):
        run(tmp_path, text, optimizer=wild, outputs=dataclasses.replace(OUTPUTS, save_period=6))
    assert saves.checkpoint_steps(tmp_path) == []


def test_training_without_validation(text, tmp_path):
    unjudged = dataclasses.replace(text, validation_files=None)
    run(tmp_path, unjudged, 1)
    file = json.loads((tmp_path / "loss_curve.json").read_text())
    assert file["validation"] == {"steps": [], "loss": []}
    assert file["steps"] == [1]


def test_validation_keeps_its_own_noise(text, tmp_path):
    """Fewer masked tokens in training make shorter targets than those of validation."""
    little = dataclasses.replace(text, noise_density=0.05)
    run(tmp_path, little, 1)
    losses = json.loads((tmp_path / "loss_curve.json").read_text())["validation"]["loss"]
    assert len(losses) == 1 and np.isfinite(losses[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": ()}, "TRAIN_FILES is not set"),
        ({"seed": -1}, "SEED is -1"),
        ({"sentencepiece_model_file": "none.model"}, "no tokenizer file none.model"),
        ({"document_mode": "cut"}, "`document_mode` must be 'skip' or 'split'"),
    ],
)
def test_text_that_cannot_be(changes, message, text, tmp_path):
    wrong = dataclasses.replace(text, **changes)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, wrong, dry_run=True)
    same = dataclasses.replace(text, validation_files=text.files)
    with pytest.raises(ValueError, match="VALIDATION_FILES and TRAIN_FILES are the same text"):
        run(tmp_path, same)


def test_a_tokenizer_larger_than_the_model_is_refused(text, tmp_path):
    small = dataclasses.replace(tiny_training.MODEL, vocab_size=200)
    with pytest.raises(ValueError, match=r"232 ids .* embedding has 200 rows"):
        run(tmp_path, text, model=small)


def test_an_unwritable_folder_is_one_error(text, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"MODEL_DIR .*file/model cannot be written"):
        run(tmp_path / "file" / "model", text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_period": 0}, "SAVE_PERIOD is 0; expected 1 or more"),
        ({"eval_period": 0}, "EVAL_PERIOD is 0"),
        ({"log_period": -1}, "LOG_PERIOD is -1"),
        ({"keep_checkpoints": 0}, "KEEP_CHECKPOINTS is 0; expected 1 or more"),
        ({"save_dtype": "float16"}, "SAVE_DTYPE is 'float16'"),
    ],
)
def test_outputs_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Outputs(**options)
