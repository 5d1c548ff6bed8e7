# SPDX-License-Identifier: Apache-2.0
"""Malformed `checkpoint` files end in one kind of error, and none of their claims allocates."""

import tracemalloc

import flax.serialization
import hypothesis
import msgpack
import numpy as np
import pytest
from classic_t5x import array_spec, write_msgpack
from hypothesis import strategies as st

from qmoe_jax.checkpoints import t5x, t5x_msgpack
from qmoe_jax.checkpoints.errors import CheckpointError

EDITS = st.lists(
    st.tuples(
        st.integers(0, 1 << 20), st.sampled_from(["set", "insert", "cut"]), st.binary(max_size=6)
    ),
    min_size=1,
    max_size=4,
)


def edit(content: bytes, edits) -> bytes:
    for at, kind, patch in edits:
        at %= len(content) + 1
        if kind == "cut":
            content = content[:at] if not patch else content[:at] + content[at + len(patch) :]
        else:
            content = content[:at] + patch + content[at + len(patch) * (kind == "set") :]
    return content


def open_edited(directory, content: bytes) -> dict[str, tuple[int, ...]]:
    (directory / "checkpoint").write_bytes(content)
    try:
        checkpoint = t5x.open_checkpoint(directory)
    except CheckpointError:
        return {}
    return t5x.shapes(checkpoint)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("edited")


@pytest.fixture(scope="module")
def real(data_dir):
    folder = data_dir / "t5x" / "tiny_switch_xxl" / "legacy" / "checkpoint_634600"
    return (folder / "checkpoint").read_bytes()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """All encodings in a few hundred bytes, so that most edits hit structure."""
    directory = tmp_path_factory.mktemp("small")
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    split = {"__msgpack_chunked_array__": True, "shape": {"0": 6}, "chunks": {"0": values.ravel()}}
    write_msgpack(directory, {"a/b": values, "c": array_spec("c", values), "d": split})
    return (directory / "checkpoint").read_bytes()


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(edits=EDITS)
def test_edited_real_files(edits, real, scratch):
    shapes = open_edited(scratch, edit(real, edits))
    assert all(size >= 0 for shape in shapes.values() for size in shape)


@hypothesis.settings(max_examples=400, deadline=None)
@hypothesis.given(edits=EDITS)
def test_edited_small_files_stay_small_in_memory(edits, small, scratch):
    tracemalloc.start()
    try:
        open_edited(scratch, edit(small, edits))
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_the_unedited_files_open(real, small, scratch):
    assert len(open_edited(scratch, real)) == 54
    assert open_edited(scratch, small) == {"a/b": (2, 3), "c": (2, 3), "d": (6,)}


def test_a_huge_shape_in_a_spec_allocates_nothing(tmp_path):
    spec = array_spec("a", np.zeros(2, np.float32))
    spec["metadata"]["shape"] = [1 << 50, 1 << 50]
    write_msgpack(tmp_path, {"a": spec})
    assert t5x.shapes(t5x.open_checkpoint(tmp_path)) == {"a": (1 << 50, 1 << 50)}


def inline(*fields, code=1):
    return msgpack.ExtType(code, msgpack.packb(fields))


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (inline([1 << 40], "float32", b"1234"), "came with 1 values"),
        (inline([0, 1 << 62], "float32", b""), "unusable shape|came with"),
        (inline([1] * 40, "float32", b"1234"), "expected a shape"),
        (inline([1], "float32", b"123"), "whole number"),
        (inline([1], "object", b"12345678"), "unknown dtype"),
        (inline([1], "float32"), "expected an array"),
        (inline([1], "float32", b"1234", code=9), "extension type 9"),
        (msgpack.ExtType(1, b"\xc1"), "malformed msgpack"),
        (inline(1.0, code=2), "complex"),
        ({"__msgpack_chunked_array__": True}, "lacks its list"),
        ({"__msgpack_chunked_array__": True, "shape": {}, "chunks": {"0": 1}}, "no array"),
        ({"__msgpack_chunked_array__": True, "shape": {"0": 0}, "chunks": {}}, "missing or differ"),
        (None, "neither an array nor"),
        ([1], "neither an array nor"),
    ],
)
def test_malformed_leaves(leaf, message, tmp_path):
    tree = {"version": 3, "optimizer": {"target": {"a": leaf}, "state": {}}}
    (tmp_path / "checkpoint").write_bytes(msgpack.packb(tree))
    with pytest.raises(CheckpointError, match=f"`a`.*({message})"):
        t5x.open_checkpoint(tmp_path)


def test_depth_is_the_files_choice(tmp_path):
    tree = {"leaf": np.zeros(1)}
    for _ in range(400):
        tree = {"x": tree}
    write_msgpack(tmp_path, {"a": tree})
    assert len(t5x.open_checkpoint(tmp_path).leaves) == 1
    deep_list = b"\x81\xa6target\x81\xa1a" + b"\x91" * 900 + b"\xc0"
    (tmp_path / "checkpoint").write_bytes(deep_list)
    with pytest.raises(CheckpointError, match="`a` is neither"):
        t5x.open_checkpoint(tmp_path)
    (tmp_path / "checkpoint").write_bytes(b"\x81\xa1x" * 100_000)
    with pytest.raises(CheckpointError, match="malformed"):
        t5x.open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "value", [np.arange(6).reshape(2, 3), np.array(5, np.int32), np.float32(2)]
)
def test_arrays_as_flax_writes_them(value):
    ours = t5x_msgpack.pack({"a": t5x_msgpack.encode_array(np.asarray(value))})
    np.testing.assert_array_equal(flax.serialization.msgpack_restore(ours)["a"], value)
    theirs = t5x_msgpack.unpack(flax.serialization.msgpack_serialize({"a": value}))
    np.testing.assert_array_equal(t5x_msgpack.decode_array(theirs["a"]), value)


def test_complex_scalars_of_flax():
    tree = t5x_msgpack.unpack(flax.serialization.msgpack_serialize({"a": 1 + 2j}))
    assert t5x_msgpack.decode_array(tree["a"]) == 1 + 2j
