# SPDX-License-Identifier: Apache-2.0
"""Packed stores through Orbax: restored by Orbax alone, sharded, and back bit for bit."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_stores
from etils import epath
from tiny_stores import GATED, Kind

from pallas_kernels import packed as packed_lib
from pallas_kernels.packed import PackedExperts, UniformExperts
from qmoe_jax.checkpoints import orbax_pack, orbax_pack_writer, packed, source
from qmoe_jax.checkpoints.errors import CheckpointError

ROOT = pathlib.Path(__file__).parents[1]
BLOCKS = re.findall(
    r"^```python\n(.*?)^```",
    (ROOT / "docs/checkpoints.md").read_text(),
    re.DOTALL | re.MULTILINE,
)
KINDS = [
    Kind("qmoe"),
    Kind("tunstall"),
    Kind("uniform", 3, 32),
    Kind("uniform", 2),
    Kind("dense"),
    Kind("qmoe", config=GATED),
]
EIGHT = dataclasses.replace(tiny_stores.CONFIG, num_experts=8)
EIGHT_IN_GROUPS = ((0, 3), (3, 6), (6, 8))


def files(folder: pathlib.Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def export(kind: Kind, folder: pathlib.Path) -> packed.PackedCheckpoint:
    """The store at `folder/store`, which is also in Orbax at `folder/orbax`."""
    store = tiny_stores.write(folder / "store", kind)
    orbax_pack_writer.save(folder / "orbax", store)
    return store


def import_folder(folder, output):
    return orbax_pack.import_checkpoint(orbax_pack.open_checkpoint(folder), output)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.codec}-{kind.bits}")
def test_comes_back_bit_for_bit(kind, tmp_path):
    """Arrays, groups, journal and manifest, in the order in which they were committed."""
    store = export(kind, tmp_path)
    back = import_folder(tmp_path / "orbax", tmp_path / "back")
    assert files(tmp_path / "back") == files(tmp_path / "store")
    assert (back.header, back.groups) == (store.header, store.groups)
    assert {path.name for path in tmp_path.iterdir()} == {"store", "orbax", "back"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.codec}-{kind.bits}")
def test_restored_arrays_become_the_records_of_the_store(kind, tmp_path):
    store = export(kind, tmp_path)
    tree = ocp.PyTreeCheckpointer().restore(tmp_path / "orbax")
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree))
    found = orbax_pack.records(orbax_pack.open_checkpoint(tmp_path / "orbax"), tree)
    for name, array in tiny_stores.params(kind).items():
        node = found
        for key in name.split("/"):
            node = node[key]
        np.testing.assert_array_equal(node, array, strict=True)
    for (stack, layer), groups in store.groups.items():
        experts = found[stack][f"layers_{layer}"]["mlp"]["expert"]
        for group in groups:
            for matrix, expected in packed.read_group(store, group).items():
                record = experts[matrix]
                if isinstance(record, PackedExperts):
                    part = packed_lib.expert_slice(record, group.start, group.stop - group.start)
                    tiny_stores.assert_same(part, expected)
                elif isinstance(record, UniformExperts):
                    part = jax.tree.map(lambda a, g=group: a[g.start : g.stop], record)
                    tiny_stores.assert_same(
                        dataclasses.replace(part, shape=expected.shape), expected
                    )
                else:
                    kernel = record["kernel"][group.start : group.stop]
                    np.testing.assert_array_equal(kernel, expected, strict=True)


def test_lines_of_the_documentation_restore_it(tmp_path):
    """The first block as it stands, with Orbax alone; then the one that makes records."""
    kind = Kind("qmoe")
    store = export(kind, tmp_path)
    assert "qmoe_jax" not in BLOCKS[0] + BLOCKS[1]
    assert len([line for line in BLOCKS[0].splitlines() if line]) == 5
    names: dict[str, Any] = {"path": str(tmp_path / "orbax")}
    exec(BLOCKS[0], names)
    expected = packed.load_experts(store, "encoder", 1, slabs=3)
    for matrix, record in expected.items():
        for part, array in names["layer"][matrix].items():
            np.testing.assert_array_equal(array, getattr(record, part), strict=True)
        static = names["static"][f"encoder/layers_1/mlp/expert/{matrix}"]
        assert (tuple(static["shape"]), static["codec"]) == (record.shape, record.codec)
    exec(BLOCKS[2], names)
    found = names["tree"]["encoder"]["layers_1"]["mlp"]["expert"]
    tiny_stores.assert_same(found["wi"], expected["wi"])


@pytest.mark.parametrize(
    "kind", [Kind("qmoe"), Kind("tunstall"), Kind("uniform", 3)], ids=lambda kind: kind.codec
)
def test_lines_of_the_documentation_restore_it_sharded(kind, tmp_path):
    """In a process of eight devices, each of which holds its slab only."""
    store = export(dataclasses.replace(kind, config=EIGHT, groups=EIGHT_IN_GROUPS), tmp_path)
    (tmp_path / "config.gin").write_text("")
    check = """
import numpy as np
leaves = jax.tree_util.tree_leaves_with_path(tree)
flat = {jax.tree_util.keystr(keys): leaf for keys, leaf in leaves}
experts = {name: leaf for name, leaf in flat.items() if "['expert']" in name}
assert experts and len(experts) < len(flat) and len(jax.devices()) == 8
for name, leaf in flat.items():
    parts = sorted(leaf.addressable_shards, key=lambda shard: shard.device.id)
    assert len(parts) == 8
    for number, part in enumerate(parts):
        whole = name not in experts
        rows = leaf.shape[0] // 8
        assert part.data.shape == (leaf.shape if whole else (rows, *leaf.shape[1:])), name
        if not whole:
            assert part.index[0] == slice(number * rows, (number + 1) * rows), name
np.savez(out, **{name: np.asarray(leaf).view(np.uint8) for name, leaf in experts.items()})
"""
    head = f"path, out = {str(tmp_path / 'orbax')!r}, {str(tmp_path / 'out.npz')!r}\n"
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", head + BLOCKS[1] + check],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    tree = ocp.PyTreeCheckpointer().restore(tmp_path / "orbax")
    with np.load(tmp_path / "out.npz") as found:
        parts = {"qmoe": 4, "tunstall": 6, "uniform": 3}[kind.codec]
        assert len(found.files) == len(store.groups) * 2 * parts
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if "['expert']" in (name := jax.tree_util.keystr(keys)):
                np.testing.assert_array_equal(found[name], leaf.view(np.uint8))


def test_records_of_device_arrays(tmp_path):
    """What the kernels are given; the layout is the loader's for as many slabs."""
    kind = Kind("qmoe", config=EIGHT, groups=EIGHT_IN_GROUPS)
    store = export(kind, tmp_path)
    tree = jax.tree.map(jax.device_put, ocp.PyTreeCheckpointer().restore(tmp_path / "orbax"))
    found = orbax_pack.records(orbax_pack.open_checkpoint(tmp_path / "orbax"), tree)
    expected = packed.load_experts(store, "decoder", 0, slabs=8)["wo"]
    record = found["decoder"]["layers_0"]["mlp"]["expert"]["wo"]
    assert jax.tree.structure(record) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(record), jax.tree.leaves(expected), strict=True):
        assert isinstance(one, jax.Array)
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("experts", "slabs"), [(1, 1), (3, 3), (8, 8), (60, 60), (67, 1), (128, 64), (2048, 64)]
)
def test_slabs_divide_the_experts(experts, slabs):
    assert orbax_pack_writer.slabs(experts) == slabs


def test_chunks_of_experts_are_of_one_expert_or_slab(tmp_path):
    export(Kind("qmoe", config=EIGHT, groups=EIGHT_IN_GROUPS), tmp_path)
    tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(tmp_path / "orbax")).tree
    leaves = tree["encoder"]["layers_1"]["mlp"]["expert"]["wi"]
    chunks = {name: leaf.storage.chunk_shape for name, leaf in leaves.items()}
    assert chunks == {
        "codes": (1, leaves["codes"].shape[1]),
        "expert_bases": (8,),
        "row_starts": (1, 42),
        "row_values": (1, 41, 2),
    }


def test_is_told_apart_and_asks_to_be_imported(tmp_path):
    export(Kind("qmoe"), tmp_path)
    assert orbax_pack.is_orbax_pack(tmp_path / "orbax")
    assert not orbax_pack.is_orbax_pack(tmp_path / "store")
    assert not orbax_pack.is_orbax_pack(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"orbax is a packed checkpoint in Orbax's form: imp"):
        source.open_source(tmp_path / "orbax")
    for content in (b"", b"[]", b'{"custom_metadata": null}', b"[" * 100_000, b"\xff"):
        (tmp_path / "orbax" / "_CHECKPOINT_METADATA").write_bytes(content)
        assert not orbax_pack.is_orbax_pack(tmp_path / "orbax")


def change(folder: pathlib.Path, edit) -> None:
    """Rewrites the metadata; a manifest is sealed again."""
    path = folder / "_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_bytes())
    custom = metadata["custom_metadata"]
    edit(custom)
    if isinstance(custom.get("manifest"), dict):
        custom["manifest"] = json.loads(tiny_stores.seal(custom["manifest"]))
    path.write_text(json.dumps(metadata))


def fewer_layers(custom):
    custom["manifest"]["config"]["num_encoder_layers"] = 3


def other_dtype(custom):
    entry = custom["manifest"]["entries"][-1]["file"]["arrays"]["token_embedder/embedding"]
    entry["dtype"] = "bfloat16"


def more_words(custom):
    for entry in custom["manifest"]["entries"]:
        if entry["kind"] == "experts":
            entry["file"]["nbytes"] = 10**9
            entry["file"]["arrays"]["wi/codes"]["shape"] = [10**6]


def other_checksum(custom):
    entry = custom["manifest"]["entries"][0]["file"]["arrays"]["wo/codes"]
    entry["crc32"] ^= 1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda custom: custom.update(version=2),
            "has format version 2, this release reads 1: use",
        ),
        (lambda custom: custom.pop("manifest"), r"is damaged \(`manifest` is missing"),
        (fewer_layers, r"is damaged \(parameter `encoder/layers_2/.*copy it again, or export"),
        (other_dtype, r"`token_embedder/embedding` is float32 \(11, 35\), expected bfloat16"),
        (more_words, r"/wi/codes` is uint16 \(3, .* and about 4000000 bytes"),
        (other_checksum, r"`wo/codes` is not what experts/decoder.layers_0.0002-0002.bin held"),
    ],
)
def test_metadata_that_do_not_fit_are_refused(edit, message, tmp_path):
    export(Kind("qmoe"), tmp_path)
    change(tmp_path / "orbax", edit)
    with pytest.raises(CheckpointError, match=message):
        import_folder(tmp_path / "orbax", tmp_path / "back")


def test_arrays_that_do_not_fit_are_refused(tmp_path):
    """An array of another size is never read; a missing or a changed one is found."""
    export(Kind("qmoe"), tmp_path)
    kept = json.loads((tmp_path / "orbax" / "_CHECKPOINT_METADATA").read_bytes())
    tree = ocp.PyTreeCheckpointer().restore(tmp_path / "orbax")
    experts = tree["encoder"]["layers_1"]["mlp"]["expert"]["wi"]
    codes, starts = experts["codes"], experts["row_starts"]
    cases = [
        ("codes", np.pad(codes, ((0, 0), (0, 64_000))), r"wi/codes` is uint16 \(3, 64"),
        ("codes", codes.reshape(1, -1)[:, :64], r"wi/codes` is uint16 \(1, 64\)"),
        ("codes", codes.astype(np.uint32), "wi/codes` is uint32"),
        ("codes", codes ^ np.uint16(1), r"wi` is damaged \(`codes`|wi` is damaged \(.*row"),
        ("row_starts", starts[::-1].copy() * 1000, r"wi` is damaged \(expert"),
        ("row_values", experts["row_values"] * 2, "`wi/row_values` is not what experts/encoder"),
        ("row_values", None, "cannot read `encoder/layers_1/mlp/expert/wi/row_values` of"),
    ]
    for number, (name, array, message) in enumerate(cases):
        changed = jax.tree.map(lambda leaf: leaf, tree)
        changed["encoder"]["layers_1"]["mlp"]["expert"]["wi"][name] = array
        if array is None:
            del changed["encoder"]["layers_1"]["mlp"]["expert"]["wi"][name]
        folder = tmp_path / f"case_{number}"
        custom = kept["custom_metadata"]
        ocp.PyTreeCheckpointer().save(folder, changed, custom_metadata=custom)
        with pytest.raises(CheckpointError, match=message):
            import_folder(folder, tmp_path / f"back_{number}")


@pytest.mark.parametrize("name", ["manifest.ocdbt", "d", "ocdbt.process_0"])
def test_missing_files_are_refused(name, tmp_path):
    export(Kind("qmoe"), tmp_path)
    path = tmp_path / "orbax" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(
        CheckpointError, match=r"cannot read `.*` of .*orbax.* incomplete or damaged"
    ):
        import_folder(tmp_path / "orbax", tmp_path / "back")


def test_groups_that_cannot_be_stacked_are_refused(tmp_path):
    kind = Kind("dense")
    packed.create(tmp_path / "store", tiny_stores.header(kind))
    for commit, *arguments in tiny_stores.commits(kind):
        if commit is packed.commit_experts and arguments[2] == 0:
            halves = {name: array.astype(np.float16) for name, array in arguments[3].items()}
            arguments[3] = halves
        commit(tmp_path / "store", *arguments)
    store = packed.finish(tmp_path / "store")
    with pytest.raises(
        CheckpointError, match=r"`wi/kernel` differs between .*float16.*they cannot be one"
    ):
        orbax_pack_writer.save(tmp_path / "orbax", store)
    assert not (tmp_path / "orbax").exists()


def test_nothing_remains_of_an_export_that_fails(tmp_path):
    store = tiny_stores.write(tmp_path / "store", Kind("qmoe"))
    seen = []

    def stop(name, nbytes):
        seen.append(name)
        if len(seen) == 5:
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"cannot write .*orbax: .*No space left.* Free"):
        orbax_pack_writer.save(tmp_path / "orbax", store, written=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    path = tmp_path / "store" / "experts" / "decoder.layers_0.0000-0001.bin"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"0000-0001\.bin: array `wi/codes` is damaged"):
        orbax_pack_writer.save(tmp_path / "orbax", store)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    (tmp_path / "orbax").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        orbax_pack_writer.save(tmp_path / "orbax", store)


def test_interrupted_export_leaves_nothing(tmp_path):
    store = tiny_stores.write(tmp_path / "store", Kind("qmoe"))

    def interrupt(name, nbytes):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        orbax_pack_writer.save(tmp_path / "orbax", store, written=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_import_needs_a_free_folder(tmp_path):
    export(Kind("qmoe"), tmp_path)
    with pytest.raises(CheckpointError, match="store holds a finished packed checkpoint"):
        import_folder(tmp_path / "orbax", tmp_path / "store")
