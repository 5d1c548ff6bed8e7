# SPDX-License-Identifier: Apache-2.0
"""Safetensors files: written and read back, and every kind of damage."""

import json
import struct

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from qmoe_jax.checkpoints import safetensors
from qmoe_jax.checkpoints.errors import CheckpointError

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.arange(4, dtype=ml_dtypes.bfloat16)
DATA = A.tobytes() + B.tobytes()
SOUND = {
    "__metadata__": {"format": "pt"},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "none": {"dtype": "I64", "shape": [0, 7], "data_offsets": [24, 24]},
}


def write(path, header):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + DATA)
    return path


def test_reads_arrays_of_several_dtypes(tmp_path):
    tensors = safetensors.read_header(write(tmp_path / "x.safetensors", SOUND))
    assert tensors.keys() == {"a", "b", "none"}
    np.testing.assert_array_equal(safetensors.read_tensor(tensors["a"]), A, strict=True)
    np.testing.assert_array_equal(safetensors.read_tensor(tensors["b"]), B, strict=True)
    assert safetensors.read_tensor(tensors["none"]).shape == (0, 7)


def test_writes_what_it_reads(tmp_path):
    path = tmp_path / "x.safetensors"
    shapes = {"a": (3, 2), "b": (4,)}
    with safetensors.create(path, shapes, np.dtype(ml_dtypes.bfloat16)) as add:
        add("a", A.T)
        add("b", B)
    tensors = safetensors.read_header(path)
    assert tensors["a"].offset % 8 == 0
    found = safetensors.read_tensor(tensors["a"])
    np.testing.assert_array_equal(found, A.T.astype(ml_dtypes.bfloat16), strict=True)
    np.testing.assert_array_equal(safetensors.read_tensor(tensors["b"]), B, strict=True)


@pytest.mark.parametrize(
    "name, changed",
    [
        ("a", {"data_offsets": [0, 28]}),
        ("a", {"data_offsets": [24, 0]}),
        ("a", {"data_offsets": [-24, 0]}),
        ("a", {"data_offsets": [2**60, 2**60 + 24]}),
        ("a", {"data_offsets": [8, 32]}),  # over `b`
        ("b", {"data_offsets": [1000, 1008]}),
        ("a", {"shape": [2, 4]}),
        ("a", {"shape": [True, 6]}),
        ("none", {"shape": [0, 2**40, 2**40]}),
        ("a", {"dtype": "F8_E4M3"}),
        ("a", {"dtype": None}),
    ],
)
def test_impossible_tensors(name, changed, tmp_path):
    header = SOUND | {name: SOUND[name] | changed}
    with pytest.raises(CheckpointError, match=r"x\.safetensors is no safetensors file"):
        safetensors.read_header(write(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"{",
        b"[" * 100_000,
        b'{"a":1,"a":2}',
        b'{"a": 1}',
        b"\xff",
        b'{"a":' + b"9" * 9999,
    ],
    ids=range(8),
)
def test_headers_that_are_none(header, tmp_path):
    with pytest.raises(CheckpointError, match=r"x\.safetensors is no safetensors file"):
        safetensors.read_header(write(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize("size", [0, 7, 8, 40, -1])
def test_truncated_files(size, tmp_path):
    path = write(tmp_path / "x.safetensors", SOUND)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"x\.safetensors .*copy or download it again"):
        safetensors.read_header(path)


def test_a_header_longer_than_the_file(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(CheckpointError, match="its header would have"):
        safetensors.read_header(tmp_path / "x.safetensors")


def test_a_file_that_becomes_shorter(tmp_path):
    path = write(tmp_path / "x.safetensors", SOUND)
    tensors = safetensors.read_header(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="7 of 8 bytes"):
        safetensors.read_tensor(tensors["b"])
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        safetensors.read_tensor(tensors["a"])


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6)
)
def test_damaged_headers_are_read_or_refused(edits, tmp_path_factory):
    path = write(tmp_path_factory.mktemp("fuzz") / "x.safetensors", SOUND)
    content = bytearray(path.read_bytes())
    for at, value in edits:
        content[at % len(content)] = value
    path.write_bytes(content)
    try:
        for tensor in safetensors.read_header(path).values():
            assert safetensors.read_tensor(tensor).nbytes <= 32
    except CheckpointError:
        pass
