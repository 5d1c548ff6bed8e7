# SPDX-License-Identifier: Apache-2.0
"""Orbax's layouts of T5X checkpoints: those T5X wrote bit for bit, over HTTP, and damaged."""

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
import flax.traverse_util
import ml_dtypes
import msgpack
import numpy as np
import pytest
import tensorstore as ts
from classic_t5x import ZSTD, write_array, write_files

from qmoe_jax.checkpoints import source, t5x, t5x_experts
from qmoe_jax.checkpoints.errors import CheckpointError

# Name -> folder of the step, and the model whose digests hold.
WRITTEN_BY_T5X = {
    "2024": ("tiny_switch_xxl/orbax/checkpoint_634600", "tiny_switch_xxl"),
    "2026": ("tiny_switch_base_2026/orbax/checkpoint_500100", "tiny_switch_base"),
}
NAME = "encoder/layers_1/mlp/expert/wo/kernel"
FOLDER = "target.encoder.layers_1.mlp.expert.wo.kernel"


@pytest.fixture(scope="session")
def t5x_dir(data_dir):
    return data_dir / "t5x"


@pytest.fixture
def copy(t5x_dir, tmp_path):
    """A step's folder that a test may damage."""

    def make(layout: str) -> pathlib.Path:
        folder = t5x_dir / WRITTEN_BY_T5X[layout][0]
        return shutil.copytree(folder, tmp_path / folder.name)

    return make


def digest(array):
    return hashlib.sha256(array.astype(np.float32).tobytes()).hexdigest()[:16]


def check_whole(path, model, t5x_dir):
    checkpoint = t5x.open_checkpoint(path)
    values = t5x.read_many(checkpoint, list(checkpoint.leaves))
    digests = json.loads((t5x_dir / "digests.json").read_text())[model]
    assert {name: digest(value) for name, value in values.items()} == digests
    assert {name: value.shape for name, value in values.items()} == t5x.shapes(checkpoint)


@pytest.mark.parametrize("below", ["", "..", "state"])
@pytest.mark.parametrize("layout", WRITTEN_BY_T5X)
def test_reads_what_t5x_wrote(layout, below, t5x_dir):
    folder, model = WRITTEN_BY_T5X[layout]
    check_whole(t5x_dir / folder / below, model, t5x_dir)
    step = t5x.open_checkpoint(t5x_dir / folder / below).step
    assert step == int(folder.rpartition("_")[2])


@pytest.mark.parametrize("layout", WRITTEN_BY_T5X)
def test_experts_come_in_groups(layout, t5x_dir):
    opened = source.open_source(t5x_dir / WRITTEN_BY_T5X[layout][0])
    groups = list(opened.expert_groups("encoder", 1, 3))
    experts = np.concatenate([group.arrays["wo"] for group in groups])
    assert [(group.start, group.stop) for group in groups] == [(0, 3), (3, 6), (6, 8)]
    np.testing.assert_array_equal(experts, opened.read([NAME])[NAME])


@pytest.mark.parametrize("missing", ["state.*", "_METADATA"])
def test_parameters_alone_are_read(missing, copy, t5x_dir):
    """Neither optimizer state nor, where a msgpack lies, the newer index is needed."""
    folder = copy("2024")
    for path in (folder / "state").glob(missing):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    check_whole(folder, "tiny_switch_xxl", t5x_dir)


def write_orbax(folder, values, chunks, top):
    """The msgpack of placeholders and zarr directories, as the description of Orbax says."""
    folder.mkdir(parents=True)
    prefix = f"{top}.target" if top else "target"
    leaves = {name: f"{prefix}.{name.replace('/', '.')}" for name in values}
    for name, place in leaves.items():
        write_array(folder / place, values[name], chunks, ZSTD)
    target = {name: f"PLACEHOLDER://{place}" for name, place in leaves.items()}
    state = {"target": flax.traverse_util.unflatten_dict(target, sep="/")}
    state["state"] = {"step": np.int32(9)}
    tree = {top: state} if top else state
    (folder / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(tree))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("top", ["_optimizer", ""], ids=["2022", "2024"])
def test_a_meshs_chunks(top, dtype, tmp_path):
    values = {NAME: np.arange(96).reshape(4, 4, 6).astype(dtype)}
    write_orbax(tmp_path / "state", values, (2, 4, 3), top)
    checkpoint = t5x.open_checkpoint(tmp_path)
    assert (checkpoint.step, t5x.chunk_shape(checkpoint, NAME)) == (9, (2, 4, 3))
    np.testing.assert_array_equal(t5x.read(checkpoint, NAME), values[NAME], strict=True)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_meshs_chunks_in_an_ocdbt_store(dtype, tmp_path):
    """Every chunk of every process, in a store of more than one data file."""
    experts = np.arange(8 * 16 * 24).reshape(8, 16, 24).astype(dtype)
    state = tmp_path / "checkpoint_12" / "state"
    state.mkdir(parents=True)
    base = {"driver": "ocdbt", "base": f"file://{state}/", "target_data_file_size": 2000}
    spec = {
        "driver": "zarr",
        "kvstore": base | {"path": f"{FOLDER}/"},
        "dtype": experts.dtype.name,
        "metadata": {"shape": experts.shape, "chunks": (2, 8, 8), "compressor": ZSTD},
    }
    array = ts.open(spec, create=True).result()
    for start in range(0, 8, 2):  # as if by four processes
        array[start : start + 2].write(experts[start : start + 2]).result()
    keys = [{"key": key, "key_type": 2} for key in ("target", *NAME.split("/"))]
    tree = {"tree_metadata": {NAME: {"key_metadata": keys, "value_metadata": {}}}}
    (state / "_METADATA").write_text(json.dumps(tree))
    assert len(list((state / "d").iterdir())) > 1
    checkpoint = t5x.open_checkpoint(tmp_path)
    assert (checkpoint.step, t5x.chunk_shape(checkpoint, NAME)) == (12, (2, 8, 8))
    np.testing.assert_array_equal(t5x.read(checkpoint, NAME), experts, strict=True)
    groups = t5x_experts.expert_groups(
        checkpoint, [NAME], 3, memory_budget=1 << 30, scratch_dir=None
    )
    found = np.concatenate([group.arrays[NAME] for group in groups])
    np.testing.assert_array_equal(found, experts, strict=True)


def test_the_newest_step_is_of_any_layout(t5x_dir, tmp_path):
    for layout, name in (("2024", "checkpoint_9"), ("2026", "checkpoint_10")):
        shutil.copytree(t5x_dir / WRITTEN_BY_T5X[layout][0], tmp_path / name)
    assert t5x.open_checkpoint(tmp_path).path.endswith("/checkpoint_10")


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Serves byte ranges too, which OCDBT needs."""

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        path = pathlib.Path(self.translate_path(self.path))
        if not asked or not path.is_file():
            return super().do_GET()
        content = path.read_bytes()
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        self.send_response(http.HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.wfile.write(content[first : last + 1])


@pytest.fixture
def served():
    """Serves a folder on loopback; gives its URL."""
    servers = []

    def serve(folder):
        handler = functools.partial(RangeHandler, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("layout", WRITTEN_BY_T5X)
def test_over_http(layout, served, t5x_dir):
    folder, model = WRITTEN_BY_T5X[layout]
    check_whole(f"{served(t5x_dir)}/{folder}", model, t5x_dir)


def test_nothing_at_a_url(served, tmp_path):
    with pytest.raises(CheckpointError, match=r"127\.0\.0\.1.*Give the directory of one step"):
        t5x.open_checkpoint(f"{served(tmp_path)}/checkpoint_5")


def test_an_absurd_shape_does_not_end_the_process(copy):
    """TensorStore would not survive the allocation."""
    folder = copy("2024")
    path = folder / "state" / "target.token_embedder.embedding" / ".zarray"
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps(metadata | {"shape": [1 << 33, metadata["shape"][1]]}))
    checkpoint = t5x.open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="`token_embedder/embedding`"):
        t5x.read(checkpoint, "token_embedder/embedding")


def cut(path, size):
    os.truncate(path, size)


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=os.path.getsize)


DAMAGE = {
    "2024 _METADATA cut": ("2024", lambda d: cut(d / "_METADATA", 999), "state/_METADATA: malf"),
    "2024 no .zarray": ("2024", lambda d: (d / FOLDER / ".zarray").unlink(), f"`{NAME}`.*zarray"),
    "2024 .zarray cut": ("2024", lambda d: cut(d / FOLDER / ".zarray", 9), f"`{NAME}`.*zarray"),
    "2024 no chunk": ("2024", lambda d: (d / FOLDER / "0.0.0").unlink(), f"`{NAME}`.*is missing"),
    "2024 chunk cut": ("2024", lambda d: cut(d / FOLDER / "0.0.0", 99), f"`{NAME}`"),
    "2024 msgpack cut": ("2024", lambda d: cut(d / "checkpoint", 99), "state/checkpoint: malf"),
    "2026 _METADATA cut": ("2026", lambda d: cut(d / "_METADATA", 999), "state/_METADATA: malf"),
    "2026 no _METADATA": ("2026", lambda d: (d / "_METADATA").unlink(), "no `_METADATA`"),
    "2026 manifest cut": ("2026", lambda d: cut(d / "manifest.ocdbt", 50), "manifest.ocdbt"),
    "2026 no manifest": ("2026", lambda d: (d / "manifest.ocdbt").unlink(), "cannot read.*zarray"),
    "2026 data cut": ("2026", lambda d: cut(largest(d), 9999), "cannot read"),
    "2026 no data": ("2026", lambda d: largest(d).unlink(), "cannot read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(kind, copy):
    layout, damage, message = DAMAGE[kind]
    folder = copy(layout)
    damage(folder / "state")
    with pytest.raises(CheckpointError, match=re.compile(message, re.DOTALL)) as caught:
        checkpoint = t5x.open_checkpoint(folder)
        t5x.read_many(checkpoint, list(checkpoint.leaves))
    assert str(folder) in str(caught.value)


def test_a_flipped_bit_of_the_manifest(copy):
    folder = copy("2026")
    path = folder / "state" / "manifest.ocdbt"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.ocdbt"):
        t5x.open_checkpoint(folder)


def test_an_absurd_shape(copy):
    folder = copy("2024")
    path = folder / "state" / FOLDER / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shape": [1 << 40, 96, 64]}))
    with pytest.raises(CheckpointError, match="more than any parameter"):
        t5x.open_checkpoint(folder)


def tree_of(*keys):
    entry = {"key_metadata": [{"key": key, "key_type": 2} for key in keys]}
    return json.dumps({"tree_metadata": {"x": entry}}).encode()


def placeholder(value):
    return flax.serialization.msgpack_serialize({"target": {"a": f"PLACEHOLDER://{value}"}})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"_CHECKPOINT_METADATA": b"{}", "default/_METADATA": b"{}"}, "without T5X's folder"),
        ({"state/_METADATA": tree_of("params", "a")}, "no `target` parameters"),
        ({"state/_METADATA": b"[]"}, "no `tree_metadata`"),
        ({"state/_METADATA": b"[" * 100_000}, "malformed JSON"),
        ({"state/_METADATA": b'{"tree_metadata": {}, "use_zarr3": true}'}, "zarr v3"),
        ({"state/_METADATA": b'{"tree_metadata": {"x": 3}}'}, "malformed entry 'x'"),
        ({"state/_METADATA": tree_of("target", "../a")}, "unusable parameter name"),
        ({"state/checkpoint": placeholder("../secret")}, "does not lie within the checkpoint"),
        ({"checkpoint": placeholder("target.a")}, "cannot read `a`"),
        ({"state/checkpoint": msgpack.packb({"version": 4, "optimizer": {}})}, "version 4"),
        ({"state/manifest.ocdbt": b""}, "no `_METADATA`"),
        ({"checkpoint_5/checkpoint": b"", "checkpoint_6/_METADATA": b""}, "checkpoint_6/_META"),
    ],
)
def test_other_things_than_checkpoints(files, message, tmp_path):
    write_files(tmp_path, files)
    with pytest.raises(CheckpointError, match=message) as caught:
        t5x.open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)
