# SPDX-License-Identifier: Apache-2.0
"""Written checkpoints: read back bit for bit, also the way T5X reads; all or nothing on disk."""

import os
from typing import Any

import flax.serialization
import flax.traverse_util
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from qmoe_jax.checkpoints import t5x, t5x_writer
from qmoe_jax.checkpoints.errors import CheckpointError

WI = "encoder/layers_1/mlp/expert/wi/kernel"


def parameters(dtype):
    draw = np.random.default_rng(0).standard_normal
    values = {
        "token_embedder/embedding": draw((17, 4)),
        WI: draw((5, 4, 6)),
        "encoder/encoder_norm/scale": np.array([np.nan, -0.0, np.inf, 1e-40]),
        "all_zero": np.zeros((3, 2)),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 3)),
    }
    return {name: array.astype(dtype) for name, array in values.items()}


def assert_same_bits(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    assert got.tobytes() == want.tobytes()


def restore(directory) -> Any:
    return flax.serialization.msgpack_restore((directory / "checkpoint").read_bytes())


def read_as_t5x_does(directory):
    """The steps of T5X's load_t5x_checkpoint: flax, then tensorstore from each spec's path."""
    tree = restore(directory)
    flat: dict[str, Any] = flax.traverse_util.flatten_dict(
        tree["optimizer"]["target"], sep="/", is_leaf=lambda _, value: "driver" in value
    )
    values = {}
    for name, spec in flat.items():
        spec["kvstore"]["path"] = os.path.join(directory, spec["kvstore"]["path"])
        for writers_choice in ("chunks", "compressor"):
            del spec["metadata"][writers_choice]
        values[name] = ts.open(ts.Spec(spec), open=True).result().read().result()
    return tree, values


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_round_trip_bit_for_bit(dtype, tmp_path):
    params = parameters(dtype)
    path = t5x_writer.save(tmp_path, params, 42)
    assert path == tmp_path / "checkpoint_42"
    checkpoint = t5x.open_checkpoint(tmp_path)
    assert (checkpoint.path, checkpoint.step, checkpoint.version) == (str(path), 42, 3)
    read = t5x.read_many(checkpoint, list(params))
    tree, read_by_t5x = read_as_t5x_does(path)
    assert set(checkpoint.leaves) == set(read_by_t5x) == set(params)
    for name, values in params.items():
        assert_same_bits(read[name], values)
        assert_same_bits(read_by_t5x[name], values)
    assert (tree["version"], tree["optimizer"]["state"]) == (3, {"step": 42})
    assert tree["optimizer"]["state"]["step"].dtype == np.int32


def test_specs_are_those_t5x_writes(data_dir, tmp_path):
    source = data_dir / "t5x" / "tiny_switch_xxl" / "legacy" / "checkpoint_634600"
    checkpoint = t5x.open_checkpoint(source)
    path = t5x_writer.save(tmp_path, t5x.read_many(checkpoint, list(checkpoint.leaves)), 634600)
    ours, theirs = restore(path), restore(source)
    for tree in (ours, theirs):
        tree = tree["optimizer"]
        for stack in ("encoder", "decoder"):
            for kernel in tree["target"][stack]["layers_1"]["mlp"]["expert"].values():
                kernel["kernel"]["metadata"]["chunks"][0] = None  # ours: one expert a chunk
        tree["state"].pop("param_states", None)
    assert ours == theirs


def test_cast(tmp_path):
    params = parameters(np.float32)
    t5x_writer.save(tmp_path, params, 0, ml_dtypes.bfloat16)
    checkpoint = t5x.open_checkpoint(tmp_path)
    for name, values in params.items():
        assert_same_bits(t5x.read(checkpoint, name), values.astype(ml_dtypes.bfloat16))


def test_every_chunk_is_stored_and_every_expert_has_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(t5x_writer, "_CHUNK_BYTES", 64)
    path = t5x_writer.save(tmp_path, parameters(np.float32), 1)
    files = {
        name: len(os.listdir(path / f"target.{name.replace('/', '.')}")) - 1
        for name in (WI, "all_zero", "token_embedder/embedding", "scalar")
    }
    assert files == {WI: 5, "all_zero": 1, "token_embedder/embedding": 5, "scalar": 1}
    checkpoint = t5x.open_checkpoint(path)
    assert t5x.chunk_shape(checkpoint, WI) == (1, 4, 6)
    assert t5x.chunk_shape(checkpoint, "token_embedder/embedding") == (4, 4)


def test_experts_come_in_slices_in_any_order(tmp_path):
    values = parameters(np.float32)[WI]
    with t5x_writer.create(tmp_path, step=3, dtype=ml_dtypes.bfloat16) as writer:
        write = t5x_writer.add_experts(writer, WI, (5, 4, 6), np.float32)
        for start, stop in [(3, 5), (0, 1), (1, 3)]:
            write(start, values[start:stop])
        assert not (tmp_path / "checkpoint_3").exists()
    read = t5x.read(t5x.open_checkpoint(tmp_path), WI)
    assert_same_bits(read, values.astype(ml_dtypes.bfloat16))


def test_slices_that_do_not_fit(tmp_path):
    with t5x_writer.create(tmp_path, step=3) as writer:
        write = t5x_writer.add_experts(writer, WI, (5, 4, 6), np.float32)
        for start, shape in [(4, (2, 4, 6)), (-1, (1, 4, 6)), (0, (1, 6, 4))]:
            with pytest.raises(CheckpointError, match="do not fit"):
                write(start, np.zeros(shape, np.float32))
        write(0, np.zeros((5, 4, 6), np.float32))
        with pytest.raises(CheckpointError, match="written already"):
            write(2, np.zeros((1, 4, 6), np.float32))


def test_a_left_out_expert_spoils_the_checkpoint(tmp_path):
    with (
        pytest.raises(CheckpointError, match=f"`{WI}`.*lacks 2 of its 5 experts, the first 1"),
        t5x_writer.create(tmp_path, step=3) as writer,
    ):
        write = t5x_writer.add_experts(writer, WI, (5, 4, 6), np.float32)
        write(0, np.zeros((1, 4, 6), np.float32))
        write(3, np.zeros((2, 4, 6), np.float32))
    assert not list(tmp_path.iterdir())


def test_nothing_remains_of_an_interrupted_write(tmp_path):
    with pytest.raises(KeyboardInterrupt), t5x_writer.create(tmp_path, step=3) as writer:
        t5x_writer.add(writer, "a", np.ones(3))
        assert [p.name.split("-")[0] for p in tmp_path.iterdir()] == ["checkpoint_3.tmp"]
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_existing_checkpoints_are_kept(tmp_path):
    path = t5x_writer.save(tmp_path, {"a": np.ones(3)}, 3)
    before = (path / "checkpoint").read_bytes()
    with pytest.raises(CheckpointError, match="checkpoint_3 exists already: remove it"):
        t5x_writer.save(tmp_path, {"b": np.ones(3)}, 3)
    with (
        pytest.raises(CheckpointError, match="checkpoint_4 exists already"),
        t5x_writer.create(tmp_path, step=4),
    ):
        (tmp_path / "checkpoint_4").mkdir()
    assert (path / "checkpoint").read_bytes() == before


@pytest.mark.parametrize(
    ("path", "step", "message"),
    [
        ("gs://bucket/model", 1, "local folder and copy it"),
        ("ok", -1, "expected a step"),
        ("ok", 1 << 31, "expected a step"),
        ("file/below", 1, "cannot write"),
    ],
)
def test_unusable_destinations(path, step, message, tmp_path):
    (tmp_path / "file").touch()
    where = path if "://" in path else tmp_path / path
    with pytest.raises(CheckpointError, match=message):
        t5x_writer.save(where, {"a": np.ones(3)}, step)


@pytest.mark.parametrize("names", ["a//b", "", "../a", "a/b a.b", "a a/b", "a/b a"])
def test_unusable_names(names, tmp_path):
    with (
        pytest.raises(CheckpointError, match=r"no path of a parameter|cannot be added"),
        t5x_writer.create(tmp_path, step=1) as writer,
    ):
        for name in names.split(" "):
            t5x_writer.add(writer, name, np.ones(3))


def test_unusable_dtypes(tmp_path):
    with pytest.raises(CheckpointError, match="unknown dtype"):
        t5x_writer.save(tmp_path, {"a": np.array(["text"])}, 1)
