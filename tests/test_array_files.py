# SPDX-License-Identifier: Apache-2.0
"""Array files: bit for bit there and back, whole or not at all, every damage noticed."""

import errno
import json
import os

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_jax.checkpoints import array_files
from qmoe_jax.checkpoints.array_files import ALIGNMENT, DTYPES, ArrayEntry, FileEntry
from qmoe_jax.checkpoints.errors import CheckpointError

ARRAYS = {
    "a/scale": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a/codes": np.arange(5, dtype=np.uint16),
    "b": np.array([[1.5, -2.0]], ml_dtypes.bfloat16),
}


def _random(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    size = DTYPES[dtype].itemsize * int(np.prod(shape))
    raw = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    return raw.view(DTYPES[dtype]).reshape(shape)  # NaNs and all


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (0,), (3, 0, 2), (2, 3, 5), (2, 1, 3, 2)])
def test_round_trip(dtype, shape, tmp_path):
    array = _random(dtype, shape)
    file = array_files.write_arrays(tmp_path, "params/x.bin", {"one": array[..., None], "x": array})
    found = array_files.read_array(tmp_path, file, "x")
    assert (found.dtype, found.shape) == (DTYPES[dtype], shape)
    assert found.tobytes() == array.tobytes()
    assert found.flags.writeable
    assert file.nbytes == (tmp_path / "params/x.bin").stat().st_size


def test_layout(tmp_path):
    """Aligned, little endian, C order, zeros between."""
    array = np.arange(6, dtype=">f4").reshape(2, 3).T
    file = array_files.write_arrays(
        tmp_path, "x", {"first": np.array([7], np.uint8), "array": array}
    )
    entry = file.arrays["array"]
    assert (entry.offset, entry.dtype, entry.shape) == (ALIGNMENT, "float32", (3, 2))
    expected = b"\7" + bytes(63) + np.array([[0, 3], [1, 4], [2, 5]], "<f4").tobytes()
    assert (tmp_path / "x").read_bytes() == expected
    np.testing.assert_array_equal(array_files.read_array(tmp_path, file, "array"), array)


def test_offsets_are_aligned(tmp_path):
    file = array_files.write_arrays(tmp_path, "x", ARRAYS)
    assert [entry.offset for entry in file.arrays.values()] == [0, 64, 128]
    for key, array in ARRAYS.items():
        np.testing.assert_array_equal(array_files.read_array(tmp_path, file, key), array)


def test_no_arrays(tmp_path):
    assert array_files.write_arrays(tmp_path, "x", {}) == FileEntry("x", 0, {})
    assert (tmp_path / "x").read_bytes() == b""


def test_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`x` has dtype int64; expected one of uint8, uint16"):
        array_files.write_arrays(tmp_path, "f", {"ok": np.array([1], np.uint8), "x": np.arange(3)})
    assert not list(tmp_path.iterdir())


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_every_flipped_byte_is_noticed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flip")
    file = array_files.write_arrays(folder, "x.bin", ARRAYS)
    key = data.draw(st.sampled_from(sorted(ARRAYS)))
    entry = file.arrays[key]
    at = entry.offset + data.draw(st.integers(0, entry.nbytes - 1))
    content = bytearray((folder / "x.bin").read_bytes())
    content[at] ^= data.draw(st.integers(1, 255))
    (folder / "x.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"x\.bin: array `{key}` is damaged .*checksum"):
        array_files.read_array(folder, file, key)
    for other in ARRAYS.keys() - {key}:
        assert array_files.read_array(folder, file, other).tobytes() == ARRAYS[other].tobytes()


def test_truncation_is_noticed(tmp_path):
    file = array_files.write_arrays(tmp_path, "x.bin", ARRAYS)
    os.truncate(tmp_path / "x.bin", file.nbytes - 1)
    with pytest.raises(CheckpointError, match=r"`b` is damaged \(expected 4 bytes.* found 3 with"):
        array_files.read_array(tmp_path, file, "b")
    os.truncate(tmp_path / "x.bin", 0)
    with pytest.raises(CheckpointError, match="found 0 with"):
        array_files.read_array(tmp_path, file, "b")


def test_missing_file(tmp_path):
    file = array_files.write_arrays(tmp_path, "x.bin", ARRAYS)
    (tmp_path / "x.bin").unlink()
    message = r"x\.bin cannot be read \(No such file or directory\): restore .* compress again"
    with pytest.raises(CheckpointError, match=message):
        array_files.read_array(tmp_path, file, "b")
    (tmp_path / "x.bin").mkdir()
    with pytest.raises(CheckpointError, match="Is a directory"):
        array_files.read_array(tmp_path, file, "b")


def test_json_round_trip(tmp_path):
    file = array_files.write_arrays(
        tmp_path, "experts/x.bin", ARRAYS | {"none": np.array([], np.uint8)}
    )
    assert array_files.from_json(json.loads(json.dumps(array_files.to_json(file)))) == file


ENTRY = {"dtype": "float32", "shape": [2, 3], "offset": 64, "crc32": 5}
FILE = {"name": "params/x.bin", "nbytes": 88, "arrays": {"x": ENTRY}}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dtype": "float64"}, "unknown dtype 'float64'"),
        ({"dtype": 4}, "`dtype` is missing or not of type str"),
        ({"shape": [2, -3]}, "impossible shape"),
        ({"shape": [True, 3]}, "impossible shape"),
        ({"shape": [2.0, 3]}, "impossible shape"),
        ({"shape": [1, 1, 1, 1, 1]}, "impossible shape"),
        ({"shape": [0, 2**62, 2**62]}, "impossible shape"),
        ({"shape": [0, 10**400]}, "impossible shape"),
        ({"shape": [2**50]}, "ends past the 88 bytes"),
        ({"shape": 3}, "`shape` is missing or not of type list"),
        ({"offset": 65}, "ends past the 88 bytes of 'params/x.bin'"),
        ({"offset": -1}, "`offset` is -1"),
        ({"offset": True}, "`offset` is missing or not of type int"),
        ({"crc32": 2**63}, "`crc32` is 9223372036854775808"),
        ({"crc32": None}, "`crc32` is missing"),
    ],
)
def test_array_entries_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        array_files.from_json(FILE | {"arrays": {"x": ENTRY | changes}})


@pytest.mark.parametrize("value", [None, [], "x", 3, {}, FILE | {"arrays": []}, {"name": "x"}])
def test_file_entries_are_checked(value):
    with pytest.raises(ValueError, match=r"`(name|nbytes|arrays)` is missing"):
        array_files.from_json(value)


NAMES = [
    "../x",
    "params/../../x",
    "/etc/passwd",
    "params//x",
    "params/./x",
    "~/x",
    "params\\..\\x",
    "C:/x",
    ".hidden",
    "",
    "params/",
    "a\0b",
    "x\n",
    "\ud800",
    "é",
    "x" * 300,
]


@pytest.mark.parametrize("name", NAMES)
def test_paths_stay_below_the_checkpoint(name, tmp_path):
    with pytest.raises(ValueError, match="below the checkpoint"):
        array_files.from_json(FILE | {"name": name})
    with pytest.raises(ValueError, match="below the checkpoint"):
        array_files.write_arrays(tmp_path / "store", name, ARRAYS)
    assert not list(tmp_path.iterdir())


def test_absurd_entry_reads_nothing(tmp_path):
    """An entry is only as large as its file."""
    (tmp_path / "x").write_bytes(b"1234")
    file = FileEntry("x", 4, {"a": ArrayEntry("uint8", (4,), 2**40, 0)})
    with pytest.raises(CheckpointError, match="found 0 with"):
        array_files.read_array(tmp_path, file, "a")


def _fail(number: int):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


class FullDisk:
    """A file that takes `room` bytes and no more."""

    def __init__(self, handle, room: int):
        self._handle, self._room = handle, room

    def __getattr__(self, name):
        return getattr(self._handle, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._handle.close()

    def write(self, data):
        taken = self._handle.write(bytes(data)[: self._room])
        self._room -= taken
        if len(data) and not taken:
            _fail(errno.ENOSPC)()
        return taken


def _fill_disk(monkeypatch, room: int) -> None:
    def limited(*arguments, **options):
        return FullDisk(open(*arguments, **options), room)

    monkeypatch.setattr(array_files, "open", limited, raising=False)


FULL = r"x\.bin cannot be written \(No space left on device\): free space .*OUTPUT_DIR.* intact"


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_full_disk_leaves_nothing_half_written(step, tmp_path, monkeypatch):
    old = array_files.write_arrays(tmp_path, "x.bin", {"a": np.array([1, 2, 3], np.uint8)})
    if step == "write":
        _fill_disk(monkeypatch, 30)
    else:
        monkeypatch.setattr(os, step, _fail(errno.ENOSPC))
    with pytest.raises(CheckpointError, match=FULL):
        array_files.write_arrays(tmp_path, "x.bin", ARRAYS)
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]
    assert array_files.read_array(tmp_path, old, "a").tolist() == [1, 2, 3]


def test_interrupt_leaves_nothing_half_written(tmp_path):
    def write():
        with array_files.replacing(tmp_path / "x.bin") as handle:
            handle.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"file/a/x cannot be written \(File exists\)"):
        array_files.write_arrays(tmp_path / "file/a", "x", ARRAYS)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="names open files by /proc")
def test_files_are_on_disk_before_they_appear(tmp_path, monkeypatch):
    """Content, then the name, then the folders' entries: in this order, or a crash could tell."""
    steps = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}

    def fsync(descriptor):
        steps.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(f"{tmp_path}"))
        real["fsync"](descriptor)

    def replace(source, target):
        steps.append("rename")
        real["replace"](source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    array_files.write_arrays(tmp_path, "a/b/x", ARRAYS)
    assert steps == ["", "/a", "/a/b/x.tmp", "rename", "/a/b"]


def test_text_and_lines(tmp_path):
    path = tmp_path / "new" / "journal"
    array_files.write_text(path, "one\n")
    array_files.append_line(path, "zwei: ä")
    array_files.append_line(path, "3")
    assert path.read_text() == "one\nzwei: ä\n3\n"
    array_files.write_text(path, "new")
    assert path.read_text() == "new"
    assert [file.name for file in path.parent.iterdir()] == ["journal"]


@pytest.mark.parametrize("step", ["write", "fsync"])
def test_half_a_line_is_taken_back(step, tmp_path, monkeypatch):
    path = tmp_path / "x.bin"
    array_files.write_text(path, "one\n")
    if step == "write":
        _fill_disk(monkeypatch, 2)
    else:
        monkeypatch.setattr(os, "fsync", _fail(errno.ENOSPC))
    with pytest.raises(CheckpointError, match=FULL):
        array_files.append_line(path, "two")
    assert path.read_text() == "one\n"
    monkeypatch.undo()
    array_files.append_line(path, "three")
    assert path.read_text() == "one\nthree\n"


def test_lines_need_a_file(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        array_files.append_line(tmp_path / "x", "one")
    assert not list(tmp_path.iterdir())


def test_new_folder_appears_whole_or_not_at_all(tmp_path):
    with array_files.new_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("x")
        assert folder.parent == tmp_path / "a" and folder.name != "b"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"
    with pytest.raises(CheckpointError, match=r"b exists already"):  # noqa: SIM117
        with array_files.new_folder(tmp_path / "a" / "b"):
            raise AssertionError
    with pytest.raises(CheckpointError, match=r"cannot write to gs:"):
        array_files.check_new("gs://bucket/x")
    with pytest.raises(CheckpointError, match=r"cannot write .*c: No space left on device\. Free"):  # noqa: SIM117
        with array_files.new_folder(tmp_path / "c") as folder:
            (folder / "file").write_text("x")
            raise OSError(28, "No space left on device")
    with pytest.raises(CheckpointError, match="exists already"):  # noqa: SIM117
        with array_files.new_folder(tmp_path / "d"):
            (tmp_path / "d").mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "d"]
