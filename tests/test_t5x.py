# SPDX-License-Identifier: Apache-2.0
"""Classic T5X checkpoints: those T5X wrote bit for bit, every encoding, every kind of damage."""

import functools
import hashlib
import http.server
import json
import os
import pathlib
import re
import shutil
import threading

import flax.serialization
import ml_dtypes
import msgpack
import numpy as np
import numpy.typing as npt
import pytest
from classic_t5x import (
    GZIP,
    ZSTD,
    array_spec,
    write_array,
    write_checkpoint,
    write_files,
    write_msgpack,
)

from qmoe_jax.checkpoints import t5x
from qmoe_jax.checkpoints.errors import CheckpointError

WRITTEN_BY_T5X = {
    "tiny_switch_base": (500100, np.float32),
    "tiny_switch_c": (611800, ml_dtypes.bfloat16),
    "tiny_switch_xxl": (634600, np.float32),
}
NAME = "encoder/layers_1/mlp/expert/wi/kernel"
FOLDER = "target.encoder.layers_1.mlp.expert.wi.kernel"


def values_of(*shape, dtype: npt.DTypeLike = np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def digest(array):
    return hashlib.sha256(array.astype(np.float32).tobytes()).hexdigest()[:16]


@pytest.fixture(scope="session")
def t5x_dir(data_dir):
    return data_dir / "t5x"


@pytest.fixture(scope="session")
def digests(t5x_dir):
    """Of what T5X's own `load_t5x_checkpoint` returned, as float32."""
    return json.loads((t5x_dir / "digests.json").read_text())


@pytest.mark.parametrize("model", WRITTEN_BY_T5X)
def test_reads_what_t5x_wrote(model, t5x_dir, digests):
    step, dtype = WRITTEN_BY_T5X[model]
    checkpoint = t5x.open_checkpoint(t5x_dir / model / "legacy" / f"checkpoint_{step}")
    values = t5x.read_many(checkpoint, list(checkpoint.leaves))
    assert (checkpoint.step, checkpoint.version) == (step, 3)
    assert {name: digest(value) for name, value in values.items()} == digests[model]
    assert {value.dtype for value in values.values()} == {np.dtype(dtype)}
    assert {name: value.shape for name, value in values.items()} == t5x.shapes(checkpoint)


@pytest.mark.parametrize("driver", ["gcs", "gfile"])
def test_only_the_path_of_a_spec_counts(driver, t5x_dir, digests, tmp_path):
    source = t5x_dir / "tiny_switch_base"
    for folder in (source / "legacy" / "checkpoint_500100").glob("target.*"):
        os.symlink(folder, tmp_path / folder.name)
    shutil.copy(source / "alt_msgpack" / f"checkpoint.{driver}", tmp_path / "checkpoint")
    checkpoint = t5x.open_checkpoint(tmp_path)
    values = t5x.read_many(checkpoint, list(checkpoint.leaves))
    assert {name: digest(value) for name, value in values.items()} == digests["tiny_switch_base"]


def test_opening_needs_the_msgpack_alone(t5x_dir, tmp_path):
    source = t5x_dir / "tiny_switch_xxl" / "legacy" / "checkpoint_634600" / "checkpoint"
    shutil.copy(source, tmp_path)
    checkpoint = t5x.open_checkpoint(tmp_path)
    assert t5x.shapes(checkpoint)["decoder/logits_dense/kernel"] == (64, 512)
    assert checkpoint.step == 634600


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("compressor", [GZIP, ZSTD, None], ids=["gzip", "zstd", "raw"])
def test_any_chunking_and_compressor(dtype, compressor, tmp_path):
    values = values_of(5, 6, 7, dtype=dtype)
    write_checkpoint(tmp_path, {NAME: values})
    write_array(tmp_path / FOLDER, values, (2, 4, 7), compressor)
    checkpoint = t5x.open_checkpoint(tmp_path)
    np.testing.assert_array_equal(t5x.read(checkpoint, NAME), values, strict=True)
    assert t5x.chunk_shape(checkpoint, NAME) == (2, 4, 7)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_inline_leaves(dtype, tmp_path):
    values = values_of(3, 4, dtype=dtype)
    write_msgpack(tmp_path, {"a/scale": values, "b": values[0, 0]})
    checkpoint = t5x.open_checkpoint(tmp_path)
    np.testing.assert_array_equal(t5x.read(checkpoint, "a/scale"), values, strict=True)
    np.testing.assert_array_equal(t5x.read(checkpoint, "b"), np.asarray(values[0, 0]), strict=True)
    assert t5x.chunk_shape(checkpoint, "a/scale") == (3, 4)


def test_what_was_read_is_the_receivers(tmp_path):
    values = values_of(3)
    write_msgpack(tmp_path, {"inline": values, "zarr": array_spec("zarr", values)})
    write_array(tmp_path / "target.zarr", values, (3,), GZIP)
    checkpoint = t5x.open_checkpoint(tmp_path)
    for name in ("inline", "zarr"):
        t5x.read(checkpoint, name)[:] = 0
        np.testing.assert_array_equal(t5x.read(checkpoint, name), values)


def test_arrays_that_flax_splits(tmp_path, monkeypatch):
    values = values_of(7, 9)
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 40)
    write_msgpack(tmp_path, {"a/kernel": values})
    content = (tmp_path / "checkpoint").read_bytes()
    assert b"__msgpack_chunked_array__" in content
    checkpoint = t5x.open_checkpoint(tmp_path)
    np.testing.assert_array_equal(t5x.read(checkpoint, "a/kernel"), values, strict=True)


def test_version_2_stores_bfloat16_as_uint16(tmp_path):
    values = values_of(4, 6, dtype=ml_dtypes.bfloat16)
    bits = values.view(np.uint16)
    write_msgpack(tmp_path, {"inline": bits, "zarr": array_spec("zarr", bits)}, version=2)
    write_array(tmp_path / "target.zarr", bits, (3, 6), GZIP)
    checkpoint = t5x.open_checkpoint(tmp_path)
    assert checkpoint.version == 2
    for name in ("inline", "zarr"):
        np.testing.assert_array_equal(t5x.read(checkpoint, name), values, strict=True)


def test_version_0_is_the_bare_state(tmp_path):
    state = {"target": {"a": values_of(2)}, "state": {"step": np.array(3)}, "flax_mutables": {}}
    (tmp_path / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(state))
    checkpoint = t5x.open_checkpoint(tmp_path)
    assert (checkpoint.version, checkpoint.step, list(checkpoint.leaves)) == (0, 3, ["a"])


def test_without_training_state_the_directory_tells_the_step(tmp_path):
    write_msgpack(tmp_path / "checkpoint_12", {"a": values_of(2)}, optimizer={"target": {}})
    assert t5x.open_checkpoint(tmp_path).step == 12


@pytest.mark.parametrize("slash", ["", "/"])
def test_old_specs_have_their_path_at_the_top(slash, tmp_path):
    values = values_of(2, 3)
    write_checkpoint(tmp_path, {NAME: values})
    spec = array_spec(NAME, values) | {"kvstore": {"driver": "gfile"}, "path": FOLDER + slash}
    del spec["dtype"]
    spec["metadata"]["dtype"] = "<f4"
    write_msgpack(tmp_path, {NAME: spec})
    np.testing.assert_array_equal(t5x.read(t5x.open_checkpoint(tmp_path), NAME), values)


def test_a_parent_directory_means_its_newest_step(tmp_path):
    for name in ("checkpoint_9", "checkpoint_10", "checkpoint_11.tmp-1", "other"):
        write_msgpack(tmp_path / name, {"a": values_of(2)})
    (tmp_path / "checkpoint_12").mkdir()
    checkpoint = t5x.open_checkpoint(tmp_path)
    assert checkpoint.path == str(tmp_path / "checkpoint_10")
    # A link is a step too, of a folder that `checkpoint_` does not name.
    (tmp_path / "checkpoint_11").symlink_to(tmp_path / "other")
    assert t5x.open_checkpoint(tmp_path).path == str(tmp_path / "checkpoint_11")


def test_urls_and_relative_paths(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "checkpoint_7", {NAME: values_of(2, 3)})
    monkeypatch.chdir(tmp_path)
    url = t5x.open_checkpoint(f"file://{tmp_path}/checkpoint_7/")
    local = t5x.open_checkpoint("checkpoint_7/")
    assert url.path == f"file://{tmp_path}/checkpoint_7"
    assert local.path == str(tmp_path / "checkpoint_7")
    np.testing.assert_array_equal(t5x.read(url, NAME), t5x.read(local, NAME))


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


def test_over_http(tmp_path):
    values = values_of(4, 5, 6)
    write_checkpoint(tmp_path / "checkpoint_7", {NAME: values}, {NAME: (2, 5, 6)})
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}"
        checkpoint = t5x.open_checkpoint(f"{root}/checkpoint_7")
        read = t5x.read(checkpoint, NAME)
        with pytest.raises(CheckpointError, match="Give the directory of one step"):
            t5x.open_checkpoint(root)
        (tmp_path / "checkpoint_7" / FOLDER / "1.0.0").unlink()
        with pytest.raises(CheckpointError, match=r"1\.0\.0.* is missing"):
            t5x.read(checkpoint, NAME)
        server.shutdown()
    np.testing.assert_array_equal(read, values, strict=True)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither a T5X checkpoint .* give the directory of the step"),
        ({"checkpoint": b"model_checkpoint_path: x"}, "TensorFlow checkpoint; convert it"),
        ({"checkpoint": b"not msgpack at all"}, "no T5X checkpoint, or a damaged copy"),
        ({"checkpoint": b""}, "no T5X checkpoint, or a damaged copy"),
        ({"checkpoint": msgpack.packb([1, 2])}, "expected a dictionary"),
        ({"checkpoint": msgpack.packb({"version": 1, "optimizer": {}})}, "version 1"),
        ({"checkpoint": msgpack.packb({"version": 4, "optimizer": {}})}, "version 4"),
        ({"checkpoint": msgpack.packb({"version": 3, "target": {}})}, "no `target` parameters"),
    ],
)
def test_other_things_than_checkpoints(files, message, tmp_path):
    write_files(tmp_path, files)
    with pytest.raises(CheckpointError, match=message) as caught:
        t5x.open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": {"shape": [2, -3]}}, "expected a shape"),
        ({"metadata": {}}, "expected a shape"),
        ({"metadata": 3}, "lacks `metadata`"),
        ({"dtype": "object"}, "unknown dtype 'object'"),
        ({"kvstore": {"driver": "file"}}, "does not lie within the checkpoint"),
        ({"kvstore": {"path": "../../secret/"}}, "does not lie within the checkpoint"),
        ({"kvstore": {"path": "/etc/"}}, "does not lie within the checkpoint"),
        ({"transform": {"input_rank": 2}}, "transform"),
    ],
)
def test_malformed_specs(change, message, tmp_path):
    write_msgpack(tmp_path, {NAME: array_spec(NAME, values_of(2, 3)) | change})
    with pytest.raises(CheckpointError, match=f"`{NAME}`.*{message}"):
        t5x.open_checkpoint(tmp_path)


def edit_zarray(folder: pathlib.Path, **changes):
    path = folder / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "missing chunk": (lambda d: (d / "1.0.0").unlink(), "1.0.0.* is missing"),
    "truncated": (lambda d: os.truncate(d / "1.0.0", 60), "1.0.0"),
    "empty chunk": (lambda d: os.truncate(d / "1.0.0", 0), "1.0.0"),
    "no .zarray": (lambda d: (d / ".zarray").unlink(), ".zarray"),
    "bad .zarray": (lambda d: (d / ".zarray").write_text("{"), ".zarray"),
    "shape": (lambda d: edit_zarray(d, shape=[4, 5, 7]), r"shape \(4, 5, 6\).*\(4, 5, 7\)"),
    "dtype": (lambda d: edit_zarray(d, dtype="<f8"), "dtype float32.*float64"),
    "filters": (lambda d: edit_zarray(d, filters=[{"id": "delta"}]), "filters"),
    "huge chunk": (lambda d: edit_zarray(d, chunks=[1 << 40, 5, 6]), "more than the whole array"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_arrays_are_named_never_guessed(kind, tmp_path):
    damage, message = DAMAGE[kind]
    write_checkpoint(tmp_path, {NAME: values_of(4, 5, 6), "b": values_of(2)}, {NAME: (2, 5, 6)})
    damage(tmp_path / FOLDER)
    checkpoint = t5x.open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=re.compile(f"`{NAME}`.*{message}", re.DOTALL)):
        t5x.read_many(checkpoint, ["b", NAME])
    assert t5x.read(checkpoint, "b").shape == (2,)


def test_a_flipped_bit_in_a_chunk_is_noticed(tmp_path):
    write_checkpoint(tmp_path, {"b": values_of(50)})
    chunk = tmp_path / "target.b" / "0"
    content = bytearray(chunk.read_bytes())
    content[-6] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(CheckpointError, match="`b`"):
        t5x.read(t5x.open_checkpoint(tmp_path), "b")


def test_unknown_name_suggests_a_near_one(tmp_path):
    write_msgpack(tmp_path, {"encoder/encoder_norm/scale": values_of(2)})
    with pytest.raises(CheckpointError, match="Did you mean `encoder/encoder_norm/scale`"):
        t5x.read(t5x.open_checkpoint(tmp_path), "encoder/norm/scale")
