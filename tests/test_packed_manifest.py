# SPDX-License-Identifier: Apache-2.0
"""Manifests: what is written comes back; whatever else is read is refused, at little cost."""

import copy
import dataclasses
import json
import math
import pathlib
import time
import tracemalloc
from typing import Any

import pytest
import tiny_stores
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_stores import Kind

from qmoe_jax.checkpoints import packed, packed_manifest
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.checkpoints.packed_manifest import Header, PackedCheckpoint

KIND = Kind("uniform", 3, 16)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> PackedCheckpoint:
    return tiny_stores.write(tmp_path_factory.mktemp("store") / "packed", KIND)


@pytest.fixture
def manifest(store) -> dict[str, Any]:
    return json.loads((store.path / "manifest.json").read_bytes())


@pytest.fixture(scope="module")
def scratch(store, tmp_path_factory) -> pathlib.Path:
    """A store whose manifest may be damaged; its array files are the real ones."""
    folder = tmp_path_factory.mktemp("scratch") / "packed"
    folder.mkdir()
    for name in ("params", "experts"):
        (folder / name).symlink_to(store.path / name)
    return folder


def _open(folder: pathlib.Path, text: bytes) -> PackedCheckpoint | None:
    """The store with this manifest; None where it is refused, as it must be, by CheckpointError."""
    (folder / "manifest.json").write_bytes(text)
    try:
        return packed.open_checkpoint(folder)
    except CheckpointError as error:
        assert str(folder) in str(error)
        return None


def _read_all(checkpoint: PackedCheckpoint) -> None:
    packed.read_params(checkpoint, list(checkpoint.params))
    for stack, layer in tiny_stores.PLACES:
        if (stack, layer) in checkpoint.groups:
            list(packed.read_groups(checkpoint, stack, layer))


@pytest.mark.parametrize(
    "header",
    [
        tiny_stores.header(KIND),
        tiny_stores.header(Kind("qmoe", config=tiny_stores.GATED)),
        Header(
            dataclasses.replace(tiny_stores.CONFIG, min_expert_capacity=0, dropout_rate=0.1),
            "dense",
            {"text": {"split": "train ü", "seed": -1}, "empty": [None, True, 1e-30]},
            {"path": "gs://bucket/a b", "step": None},
        ),
    ],
)
def test_header_round_trip(header):
    manifest = packed_manifest.from_journal(packed_manifest.header_line(header).encode() + b"\n")
    assert packed_manifest._header(manifest) == header
    floats = [field for field in dataclasses.fields(header.config) if field.type is float]
    assert all(type(getattr(header.config, field.name)) is float for field in floats)


def test_whole_floats_may_be_ints():
    config = dataclasses.replace(tiny_stores.CONFIG, eval_capacity_factor=2.0)
    line = packed_manifest.header_line(Header(config, "qmoe", {}, {})).replace("2.0", "2")
    found = packed_manifest._header(json.loads(line)).config
    assert found == config
    assert type(found.eval_capacity_factor) is float


def test_a_header_that_could_not_be_read_is_not_written():
    """Not after hours, when the manifest is."""
    config = dataclasses.replace(tiny_stores.CONFIG, encoder_sparse_layers=(2,))
    with pytest.raises(ValueError, match=r"encoder of 2 layers, of which \(2,\) are sparse"):
        packed_manifest.header_line(Header(config, "qmoe", {}, {}))
    with pytest.raises(ValueError, match="`group_size` is 0"):
        packed_manifest.header_line(tiny_stores.header(Kind("uniform", 3, 0)))


def test_whole_manifest_round_trip(store, manifest):
    again = packed_manifest.parse(store.path, manifest)
    assert again == store
    assert again.header == tiny_stores.header(KIND)
    assert again.params.keys() == tiny_stores.params(KIND).keys()
    for place in tiny_stores.PLACES:
        assert tuple((g.start, g.stop) for g in again.groups[place]) == tiny_stores.GROUPS
    on_disk = {f"{f.parent.name}/{f.name}": f.stat().st_size for f in store.path.glob("*/*")}
    assert {name: file.nbytes for name, file in again.files.items()} == on_disk
    assert again.nbytes == sum(on_disk.values())


def test_sealing_an_unchanged_manifest_changes_nothing(manifest):
    """The seal of these tests is the format's own."""
    assert json.loads(tiny_stores.seal(copy.deepcopy(manifest))) == manifest


def test_other_versions(store, manifest):
    message = r"has format version 2, this release reads 1: use the release that wrote it"
    with pytest.raises(CheckpointError, match=message):
        packed_manifest.parse(store.path, manifest | {"version": 2})
    with pytest.raises(CheckpointError, match="format version None"):
        packed_manifest.parse(store.path, {"format": packed_manifest.FORMAT})


@pytest.mark.parametrize("value", [None, [], 3, "x", {}, {"format": "another"}])
def test_other_json(value, tmp_path):
    with pytest.raises(CheckpointError, match="not of a packed checkpoint"):
        packed_manifest.parse(tmp_path, value)


@pytest.mark.parametrize("journal", [b"", b"\n", b"{", b"[1]\n", b'{"a": 1}\n{"b"', b"\xff\n"])
def test_journals_that_are_none(journal):
    with pytest.raises(ValueError):
        packed_manifest.from_journal(journal)


def _set(manifest: Any, path: str, value: Any) -> None:
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in parents:
        manifest = manifest[key]
    manifest[last] = value


# Entries 0 to 3 are the groups (decoder first, last expert first), 4 to 7 parameters.
@pytest.mark.parametrize(
    "path, value, message",
    [
        ("codec", "other", "codec 'other' is unknown"),
        ("codec", "qmoe", r"holds \['wi/codes', 'wi/scale', .*expected \['wi/codes', 'wi/row_l"),
        ("codec", "tunstall", r"expected \['wi/codes', 'wi/nonzeros', 'wi/row_l.*wi/trees"),
        ("codec", "dense", "expected.*wi/kernel"),
        ("settings", None, "`settings` is missing or not of type dict"),
        ("settings.quantizer", 3, "quantizer's settings are missing"),
        (
            "settings.quantizer.group_size",
            8,
            r"'wi/scale'.*expected bfloat16 of shape \(2, 41, 5\)",
        ),
        ("settings.quantizer.group_size", "16", "`group_size` is '16'"),
        ("source.step", "7", "`step` is missing or not of type int"),
        ("config", {}, "model size `vocab_size` is None"),
        ("config.emb_dim", True, "model size `emb_dim` is True"),
        ("config.emb_dim", 35.0, "model size `emb_dim` is 35.0"),
        ("config.emb_dim", 36, r"expected floats of shape \(11, 36\), found float32 of shape \(11"),
        ("config.emb_dim", 0, "model size `emb_dim` is 0"),
        ("config.num_experts", 4, "decoder|encoder.*expected floats"),
        ("config.num_encoder_layers", 3, "encoder/layers_2.*found nothing"),
        ("config.num_encoder_layers", 5000, "encoder of 5000 layers"),
        ("config.encoder_sparse_layers", [1, 1], r"of which \(1, 1\) are sparse"),
        ("config.encoder_sparse_layers", [1.0], r"`encoder_sparse_layers` is \[1.0\]"),
        ("config.encoder_sparse_layers", [-1], r"of which \(-1,\) are sparse"),
        ("config.eval_capacity_factor", math.nan, "`eval_capacity_factor` is nan"),
        ("config.eval_capacity_factor", 10**400, "`eval_capacity_factor` is 1000"),
        ("config.logits_via_embedding", 1, "`logits_via_embedding` is 1"),
        ("config.logits_via_embedding", False, "`decoder/logits_dense/kernel`.*found nothing"),
        ("config.mlp_activations", ["gelu"], "`mlp_activations` is .'gelu',"),
        ("config.mlp_activations", [["relu"]], "`mlp_activations` is"),
        ("config.mlp_activations", ["gelu", "linear"], "mlp/wi/kernel` is not one of the model's"),
        ("entries", {}, "`entries` is missing or not of type list"),
        ("entries.0", None, "`kind` is missing"),
        ("entries.0.kind", "other", "unknown kind 'other'"),
        ("entries.0.stack", "middle", "middle/layers_0 is not a sparse layer"),
        ("entries.0.layer", 1, "decoder/layers_1 is not a sparse layer"),
        ("entries.1.start", 1, "decoder/layers_0: expert 0 expected next, found experts 1 to 2"),
        ("entries.0.stop", 2, "decoder/layers_0: expert 2 expected next, found experts 2 to 2"),
        (
            "entries.0.stop",
            4,
            r"expected uint32 of shape \(2, 41, 2, None\), found uint32 of shape",
        ),
        ("entries.0.file.arrays.wi/zero.dtype", "uint16", "ends past|expected uint8"),
        ("entries.0.file.arrays.wi/scale.dtype", "float16", "expected bfloat16 of shape"),
        ("entries.0.file.arrays.wi/more", {}, "`dtype` is missing"),
        ("entries.0.file.name", "../../etc/passwd", "below the checkpoint"),
        ("entries.0.file.name", "params/outer.bin", "is there twice"),
        ("entries.4.file.arrays.other", "COPY", "`other` is not one of the model's"),
        ("entries.7.file.arrays.token_embedder/embedding.dtype", "int32", "found int32 of shape"),
        ("entries.7.kind", "experts", "`stack` is missing"),
    ],
)
def test_fields_are_checked(path, value, message, manifest, scratch):
    if value == "COPY":
        value = next(iter(manifest["entries"][4]["file"]["arrays"].values()))
    _set(manifest, path, value)
    (scratch / "manifest.json").write_bytes(tiny_stores.seal(manifest))
    with pytest.raises(CheckpointError, match=f"manifest.json is damaged .*{message}") as caught:
        packed.open_checkpoint(scratch)
    assert "restore it from a copy or compress again" in str(caught.value)


@pytest.mark.parametrize("entry", range(8))
def test_entries_are_needed_once(entry, manifest, store):
    entries = manifest["entries"]
    without = json.loads(
        tiny_stores.seal(manifest | {"entries": entries[:entry] + entries[entry + 1 :]})
    )
    with pytest.raises(ValueError, match=r"has 2 experts, not 3|expert 0 expected|found nothing"):
        packed_manifest.parse(store.path, without)
    again = copy.deepcopy(entries[entry])
    again["file"]["name"] += ".other"
    twice = json.loads(tiny_stores.seal(manifest | {"entries": [*entries, again]}))
    with pytest.raises(ValueError, match=r"is there twice|expected next, found experts"):
        packed_manifest.parse(store.path, twice)
    twice = json.loads(tiny_stores.seal(manifest | {"entries": [*entries, entries[entry]]}))
    with pytest.raises(ValueError, match="is there twice"):
        packed_manifest.parse(store.path, twice)


def test_damage_without_a_new_checksum(manifest, scratch):
    manifest["settings"]["quantizer"]["method"] = "rtn"
    (scratch / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="its checksum does not match its records"):
        packed.open_checkpoint(scratch)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_bytes(store, scratch, data):
    """A manifest with a few bytes changed opens as the same store, or not at all."""
    text = bytearray((store.path / "manifest.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        span = data.draw(st.sampled_from([0, 1, 1, 1, 5, 200, len(text)]))
        text[at : at + span] = data.draw(st.binary(max_size=4))
        if not text:
            break
    found = _open(scratch, bytes(text))
    assert found is None or dataclasses.replace(found, path=store.path) == store


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**31 - 1, 2**31, 2**62, 2**63, 10**300, -(2**63)]),
    st.sampled_from([0.5, 2.0, math.nan, math.inf, 1e300]),
    st.sampled_from(["", "uint8", "float32", "experts", "qmoe", "encoder", "../x", "\ud800", "\0"]),
    st.sampled_from([[], {}, [[]], [0], [1, 0], [2**62, 0, 2**62], {"a": None}, ["relu"]]),
)


def _mutate(data: st.DataObject, value: Any) -> Any:
    """`value` with something in it replaced, removed, repeated or renamed."""
    if not value or not isinstance(value, dict | list) or data.draw(st.integers(0, 7)) == 0:
        return copy.deepcopy(data.draw(VALUES))
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = data.draw(st.sampled_from(keys))
    action = data.draw(st.sampled_from(["enter"] * 7 + ["remove", "swap", "copy"]))
    other = data.draw(st.sampled_from(keys))
    if action == "enter":
        value[key] = _mutate(data, value[key])
    elif action == "remove":
        del value[key]
    elif action == "swap":
        value[key], value[other] = value[other], value[key]
    else:
        value[key] = copy.deepcopy(value[other])
    return value


@given(st.data())
@settings(max_examples=400, deadline=10_000)
def test_damaged_values(store, scratch, data):
    """With a matching checksum: refused, or read without any other error."""
    manifest = json.loads((store.path / "manifest.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        _mutate(data, manifest)
    try:
        found = _open(scratch, tiny_stores.seal(manifest))
        if found is not None:
            _read_all(found)
    except CheckpointError as error:
        assert str(scratch) in str(error)


@pytest.mark.parametrize(
    "path, value",
    [
        ("entries.0.file.arrays.wi/codes.shape", [2**40, 0, 2**40, 3]),
        ("entries.0.file.arrays.wi/codes.shape", [2**14, 2**14, 2**14, 2**14]),
        ("entries.0.file.nbytes", 2**62),
        ("entries.0.stop", 2**62),
        ("config.num_experts", 2**31 - 1),
        ("config.num_encoder_layers", 2**31 - 1),
        ("config.num_decoder_layers", 4096),
        ("config.vocab_size", 2**31 - 1),
        ("config.encoder_sparse_layers", list(range(4096))),
        ("config.expert_mlp_dim", 2**31 - 1),
        ("settings.quantizer.group_size", 2**31 - 1),
    ],
)
def test_absurd_sizes_cost_nothing(path, value, manifest, scratch):
    _set(manifest, path, value)
    text = tiny_stores.seal(manifest)
    begun = time.perf_counter()
    tracemalloc.start()
    try:
        assert _open(scratch, text) is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20
    assert time.perf_counter() - begun < 10


@pytest.mark.parametrize("text", [b"[" * 10**6, b'{"a":' * 10**6, b"9" * 5000, b"", b"\xff\xfe{"])
def test_text_that_is_no_manifest(text, scratch):
    assert _open(scratch, text) is None


def test_deep_values(manifest, scratch):
    """As deep as the reader goes, the checksum's writer must not fail differently."""
    for depth in (100, 900, 990, 1100, 5000):
        text = tiny_stores.seal(manifest)
        deep = b"[" * depth + b"]" * depth
        assert _open(scratch, text.replace(b'"text": []', b'"text": ' + deep)) is None
