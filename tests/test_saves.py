# SPDX-License-Identifier: Apache-2.0
import pathlib
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training

from qmoe_jax.checkpoints import t5x_writer
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.runs import saves
from qmoe_jax.training import optimizer, step


def new_state(seed: int = 0, width: int = 3):
    options = tiny_training.OPTIMIZER
    transformation = optimizer.make_optimizer(options, optimizer.make_schedule(options, 0, 9))
    rng = np.random.default_rng(seed)
    shapes = {"encoder": {"expert": {"wi": {"kernel": (4, 3, 5)}}}, "norm": {"scale": (width,)}}
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    return step.new_state(params, transformation)


def like(state):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_the_newest_state_alone_is_kept(tmp_path):
    assert saves.newest_state(tmp_path) is None
    for number in (2, 5):
        saves.save_state(tmp_path, number, new_state(number), {"SEED": number})
    assert saves.newest_state(tmp_path) == saves.Saved(5, {"SEED": 5})
    assert_equal(saves.restore_state(tmp_path, 5, like(new_state())), new_state(5))
    assert [path.name for path in (tmp_path / "train_state").iterdir()] == ["5"]


def save_on_a_full_disk(folder: str) -> None:
    """Prints the error; files cannot grow beyond 50,000 bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        saves.save_state(pathlib.Path(folder), 4, new_state(4, width=40_000), {"SEED": 4})
    except CheckpointError as error:
        print(error)


def test_a_state_half_written_is_not_there(tmp_path):
    """In a process of its own: Orbax leaves a loop behind that its writes still answer to."""
    state = new_state(2, width=40_000)
    saves.save_state(tmp_path, 2, state, {"SEED": 2})
    done = subprocess.run(
        [sys.executable, "-c", f"import test_saves as t; t.save_on_a_full_disk({str(tmp_path)!r})"],
        cwd=pathlib.Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "train_state cannot be written (File too large): free space on that disk" in done.stdout
    assert (tmp_path / "train_state" / "4.orbax-checkpoint-tmp").exists()
    assert saves.newest_state(tmp_path) == saves.Saved(2, {"SEED": 2})
    assert_equal(saves.restore_state(tmp_path, 2, like(state)), state)
    saves.save_state(tmp_path, 4, state, {"SEED": 4})
    assert saves.newest_state(tmp_path) == saves.Saved(4, {"SEED": 4})
    assert [path.name for path in (tmp_path / "train_state").iterdir()] == ["4"]


def test_a_damaged_state_is_named(tmp_path):
    message = r"train_state cannot be read .*restore it"
    saves.save_state(tmp_path, 2, new_state(2), {"SEED": 2})
    (tmp_path / "train_state" / "2" / "state" / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match=message):
        saves.restore_state(tmp_path, 2, like(new_state()))
    (tmp_path / "train_state" / "2" / "settings" / "metadata").write_text("{")
    with pytest.raises(CheckpointError, match=message):
        saves.newest_state(tmp_path)


def test_checkpoints_are_written_once_and_the_newest_kept(tmp_path):
    params = new_state(1).params
    for number in (1, 10, 9):
        saves.save_checkpoint(tmp_path, number, params, np.dtype(np.float32))
    (tmp_path / "checkpoint_10" / "mark").touch()
    saves.save_checkpoint(tmp_path, 10, params, np.dtype(np.float32))
    assert (tmp_path / "checkpoint_10" / "mark").exists()
    assert saves.checkpoint_steps(tmp_path) == [1, 9, 10]
    saves.keep_newest(tmp_path, None)
    assert saves.checkpoint_steps(tmp_path) == [1, 9, 10]
    saves.keep_newest(tmp_path, 2)
    assert saves.checkpoint_steps(tmp_path) == [9, 10]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint_9", "checkpoint_10"}


def test_what_a_killed_run_left_is_removed(tmp_path):
    params = {"norm/scale": np.ones(3, np.float32)}
    t5x_writer.save(tmp_path, params, 4)
    (tmp_path / "checkpoint_8.tmp-0123").mkdir()
    (tmp_path / "checkpoint_2.tmp-removed").mkdir()
    (tmp_path / "other.tmp-1").mkdir()
    assert saves.checkpoint_steps(tmp_path) == [4]
    saves.remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint_4", "other.tmp-1"}


def test_no_folder_has_no_checkpoints(tmp_path):
    assert saves.checkpoint_steps(tmp_path / "new") == []
