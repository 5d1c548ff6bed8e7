# SPDX-License-Identifier: Apache-2.0
"""Files of `torch.save`: what they hold, and that nothing they name is ever run."""

import pickle
import zipfile

import hypothesis
import ml_dtypes
import numpy as np
import pytest
import torch_files
from hypothesis import strategies as st

from qmoe_jax.checkpoints import torch_pickle
from qmoe_jax.checkpoints.errors import CheckpointError

VALUES = np.arange(12, dtype=np.float32)


def opened(path):
    archive = torch_pickle.open_archive(path)
    return archive, torch_pickle.read_object(archive)


def write_one(path, **changed):
    """A file of one tensor [4, 3], transposed, with changes that may make it impossible."""
    fields = {"count": 12, "offset": 0, "shape": (4, 3), "strides": (1, 4)} | changed
    tensor = torch_files.tensor("0", "float32", **fields)
    torch_files.write(path, {"a": tensor}, {"0": VALUES.tobytes()})


def test_reads_strided_tensors_that_share_a_storage(tmp_path):
    part = VALUES.astype(ml_dtypes.bfloat16)
    tree = {
        "transposed": torch_files.tensor("0", "float32", 12, 0, (4, 3), (1, 4)),
        "row": torch_files.tensor("0", "float32", 12, 4, (4,), (1,)),
        "scalar": torch_files.tensor("0", "float32", 12, 7, (), ()),
        "empty": torch_files.tensor("0", "float32", 12, 0, (0, 5), (5, 1)),
        "nested": [torch_files.tensor("b", "bfloat16", 12, 2, (3,), (1,)), 892, None, (True, "x")],
    }
    torch_files.write(tmp_path / "x.pt", tree, {"0": VALUES.tobytes(), "b": part.tobytes()})
    archive, found = opened(tmp_path / "x.pt")
    assert found["nested"][1:] == [892, None, (True, "x")]
    expected = {
        "transposed": VALUES.reshape(3, 4).T,
        "row": VALUES[4:8],
        "scalar": VALUES[7],
        "empty": np.empty((0, 5), np.float32),
    }
    for name, wanted in expected.items():
        array = torch_pickle.read_tensor(archive, found[name])
        np.testing.assert_array_equal(array, wanted, strict=True, err_msg=name)
    nested = torch_pickle.read_tensor(archive, found["nested"][0])
    np.testing.assert_array_equal(nested, part[2:5], strict=True)


def test_reads_what_torch_wrote(data_dir):
    """Written by torch 2.13.0 as {a: [3, 4] transposed, b: a slice, c: [2, 3] of ones}."""
    archive, found = opened(data_dir / "torch" / "strided.pt")
    arrays = {name: torch_pickle.read_tensor(archive, ref) for name, ref in found.items()}
    np.testing.assert_array_equal(arrays["a"], VALUES.reshape(3, 4).T, strict=True)
    np.testing.assert_array_equal(arrays["b"], VALUES[2:5].astype(ml_dtypes.bfloat16), strict=True)
    np.testing.assert_array_equal(arrays["c"], np.ones((2, 3), np.int64), strict=True)


def test_a_forbidden_global_is_named_and_not_run(tmp_path):
    call = torch_files.Call(torch_files.Global("os", "system"), (f"touch {tmp_path / 'touched'}",))
    torch_files.write(tmp_path / "x.pt", {"a": call}, {})
    with pytest.raises(CheckpointError, match=r"x\.pt refers to `os\.system`"):
        opened(tmp_path / "x.pt")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"offset": 1},
        {"offset": -1},
        {"shape": (4, 4)},
        {"shape": (2**40,), "strides": (0,)},
        {"shape": (2**62, 2**62, 0), "strides": (1, 1, 1)},
        {"strides": (1, 5)},
        {"strides": (-1, 4)},
        {"strides": (1,)},
        {"count": 13},
    ],
)
def test_tensors_outside_of_their_storage(changed, tmp_path):
    write_one(tmp_path / "x.pt", **changed)
    with pytest.raises(CheckpointError, match=r"x\.pt is no file that torch\.save wrote"):
        opened(tmp_path / "x.pt")


def test_odd_escapes_in_names_are_refused_without_a_warning(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02ctorch\n\\_utils\n.")
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        opened(path)


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(CheckpointError, match=r"cannot read .*x\.pt"):
        torch_pickle.open_archive(path)
    path.write_bytes(pickle.dumps({"legacy": 1}, 2))
    with pytest.raises(CheckpointError, match=r"1\.6 or later"):
        torch_pickle.open_archive(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps({}, 2))
        archive.writestr("model/byteorder", "big")
    with pytest.raises(CheckpointError, match="little endian"):
        torch_pickle.open_archive(path)


def test_a_file_that_becomes_shorter(tmp_path):
    write_one(tmp_path / "x.pt")
    archive, found = opened(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        torch_pickle.read_tensor(archive, found["a"])


EDITS = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=6)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(edits=EDITS)
def test_damaged_archives_are_read_or_refused(edits, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "x.pt"
    write_one(path)
    content = bytearray(path.read_bytes())
    for at, value in edits:
        content[at % len(content)] = value
    path.write_bytes(content)
    read_or_refuse(path)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(edits=EDITS, end=st.integers(1, 400))
def test_damaged_pickles_are_read_or_refused(edits, end, tmp_path_factory):
    """Past the checksum: with the pickle edited inside a sound archive."""
    path = tmp_path_factory.mktemp("fuzz") / "x.pt"
    write_one(path)
    with zipfile.ZipFile(path) as archive:
        content = bytearray(archive.read("model/data.pkl"))
    for at, value in edits:
        content[at % len(content)] = value
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", bytes(content[:end]))
        archive.writestr("model/data/0", VALUES.tobytes())
    read_or_refuse(path)


def read_or_refuse(path):
    try:
        archive, found = opened(path)
        for value in found.values() if isinstance(found, dict) else ():
            if isinstance(value, torch_pickle.TensorRef):
                assert torch_pickle.read_tensor(archive, value).nbytes <= VALUES.nbytes
    except CheckpointError:
        pass
