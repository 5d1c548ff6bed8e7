# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import tiny_switch
import tiny_training

from qmoe_jax.checkpoints import huggingface_writer, source, t5x_writer
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.runs import saves, starts
from qmoe_jax.runs.starts import Start
from qmoe_jax.training import program
from qmoe_jax.training.batches import TrainingText
from qmoe_jax.training.loss import Loss

TEXT = TrainingText("sentencepiece.model", "train.txt", task_feature_lengths={"inputs": 24})
CHECKPOINT = tiny_switch.DATA / "tiny_switch_base" / "legacy" / "checkpoint_500100"


def settings(text: TrainingText = TEXT, **changes):
    return starts.settings(tiny_training.recipe(**changes), text)


def write_state(folder: pathlib.Path, step: int, saved_with, first: int = 0) -> None:
    built = build()
    saves.save_state(
        folder, step, program.new_state(built), saved_with | {starts.FIRST_STEP: first}
    )


def find(folder: pathlib.Path, saved_with=None, initial=None, model=tiny_training.DROPPING):
    return starts.find(folder, saved_with or settings(), initial, model)


def build(**changes):
    recipe = tiny_training.recipe(**changes)
    return program.build(recipe, dtype=np.float32, devices=jax.devices()[:1])


def test_a_new_folder_begins_anew(tmp_path):
    assert find(tmp_path / "new") == Start(0, 0, False)
    start = find(tmp_path, initial=str(CHECKPOINT), model=tiny_switch.config("tiny_switch_base"))
    assert start == Start(500100, 500100, False)


def test_a_state_goes_before_a_checkpoint(tmp_path):
    write_state(tmp_path, 7, settings(), first=5)
    assert find(tmp_path, initial=str(CHECKPOINT)) == Start(5, 7, True)
    start = find(tmp_path)
    state = starts.first_state(build(), tmp_path, start, None)
    expected = program.new_state(build())
    jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": dataclasses.replace(tiny_training.DROPPING, num_experts=8)},
            "MODEL/num_experts was 4, is 8",
        ),
        (
            {"optimizer": dataclasses.replace(tiny_training.OPTIMIZER, learning_rate=0.1)},
            "OPTIMIZER/learning_rate was 0.05, is 0.1",
        ),
        ({"loss": Loss(z_loss=0.0)}, "LOSS/z_loss was 0.0001, is 0.0"),
        ({"batch_size": 4}, "BATCH_SIZE was 8, is 4"),
        ({"capacity": "t5x"}, "CAPACITY was 'none', is 't5x'"),
        ({"random_seed": 3}, "RANDOM_SEED was 0, is 3"),
        ({"text": dataclasses.replace(TEXT, seed=2)}, "SEED was 0, is 2"),
        (
            {"text": dataclasses.replace(TEXT, document_mode="skip")},
            "DOCUMENT_MODE was 'split', is 'skip'",
        ),
        (
            {"text": dataclasses.replace(TEXT, task_feature_lengths={"inputs": 32})},
            "TASK_FEATURE_LENGTHS/inputs was 24, is 32; ",
        ),
    ],
)
def test_a_state_of_other_settings_is_refused(changes, message, tmp_path):
    write_state(tmp_path, 7, settings())
    with pytest.raises(ValueError, match="holds the state of a training with other") as raised:
        find(tmp_path, settings(**changes))
    assert f"({message}" in str(raised.value)
    assert str(raised.value).endswith("set them as they were, or choose another folder")


def test_more_steps_are_other_settings_only_where_the_rate_goes_by_them():
    assert settings(train_steps=6) == settings(train_steps=600)
    linear = dataclasses.replace(tiny_training.OPTIMIZER, schedule="linear")
    six, more = (settings(optimizer=linear, train_steps=steps) for steps in (6, 600))
    assert six != more


def test_settings_are_those_of_their_json():
    assert json.loads(json.dumps(settings())) == settings()


@pytest.mark.parametrize(("state", "checkpoint"), [(None, 0), (None, 4), (3, 4)])
def test_checkpoints_that_would_be_made_again_are_in_the_way(state, checkpoint, tmp_path):
    if state is not None:
        write_state(tmp_path, state, settings())
    t5x_writer.save(tmp_path, {"norm/scale": np.ones(3, np.float32)}, checkpoint)
    with pytest.raises(ValueError, match=f"holds checkpoint_{checkpoint}, but no train_state"):
        find(tmp_path)


def test_earlier_checkpoints_are_not(tmp_path):
    write_state(tmp_path, 4, settings())
    for step in (2, 4):
        t5x_writer.save(tmp_path, {"norm/scale": np.ones(3, np.float32)}, step)
    assert find(tmp_path) == Start(0, 4, True)


@pytest.mark.parametrize("format", ["t5x", "huggingface"])
def test_the_parameters_of_a_checkpoint(format, tmp_path):
    """A Hugging Face folder knows no step: its training begins at 0."""
    model = tiny_switch.config("tiny_switch_base")
    initial, step = CHECKPOINT, 500100
    if format == "huggingface":
        opened = source.open_source(CHECKPOINT)
        initial, step = huggingface_writer.save(tmp_path / "hf", opened, "float32"), 0
    built = build(model=model)
    start = find(tmp_path, initial=str(initial), model=model)
    assert start == Start(step, step, False)
    state = starts.first_state(built, tmp_path, start, str(initial))
    expected = tiny_switch.params("tiny_switch_base")
    jax.tree.map(np.testing.assert_array_equal, state.params, expected)
    assert int(state.updates) == 0


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    message = r"has other sizes than MODEL: `token_embedder/embedding` \(512, 64\), not \(256, 16"
    with pytest.raises(ValueError, match=message):
        find(tmp_path, initial=str(CHECKPOINT))
    with pytest.raises(CheckpointError, match="nowhere"):
        find(tmp_path, initial=str(tmp_path / "nowhere"))


def test_the_steps_of_a_checkpoint_count(tmp_path):
    assert not starts.is_finished(Start(500100, 500100, False), tmp_path, 500101)
    with pytest.raises(ValueError, match="TRAIN_STEPS is 10; expected more than the 500100 of"):
        starts.is_finished(Start(500100, 500100, False), tmp_path, 10)


def test_a_run_is_finished_when_its_checkpoint_is_written(tmp_path):
    assert not starts.is_finished(Start(0, 5, True), tmp_path, 6)
    assert not starts.is_finished(Start(0, 6, True), tmp_path, 6)
    t5x_writer.save(tmp_path, {"norm/scale": np.ones(3, np.float32)}, 6)
    assert starts.is_finished(Start(0, 6, True), tmp_path, 6)


def test_the_folder_must_be_writable(tmp_path):
    starts.make_folder(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match=f"MODEL_DIR {folder} cannot be written"):
            starts.make_folder(folder)
