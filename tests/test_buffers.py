# SPDX-License-Identifier: Apache-2.0
"""Token buffers: rows come back as written, always as copies, from memory or from a file."""

import errno
import os

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_jax.calibration import buffers
from qmoe_jax.calibration.buffers import LENGTH_MULTIPLE, Batch, TokenBuffer

LENGTHS = np.array([3, 1, 7, 4])
OFFSETS = np.array([0, 3, 4, 11, 15])
BATCH = Batch(np.array([2, -1, 0]), (8,))


def _filled(dtype=np.float32, file=None) -> TokenBuffer:
    buffer = buffers.create(OFFSETS, 2, np.dtype(dtype), file)
    buffer.data[:] = np.arange(30).reshape(15, 2).astype(dtype)
    return buffer


@pytest.fixture(params=["memory", "file"])
def filled(request, tmp_path) -> TokenBuffer:
    return _filled(file=tmp_path / "buffer" if request.param == "file" else None)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int32])
@pytest.mark.parametrize("name", [None, "buffer"])
def test_new_buffers_are_zero(dtype, name, tmp_path):
    file = None if name is None else tmp_path / name
    buffer = buffers.create(OFFSETS, 3, np.dtype(dtype), file)
    assert (buffer.data.shape, buffer.data.dtype) == ((15, 3), np.dtype(dtype))
    assert not buffer.data.any()
    assert buffer.lengths.tolist() == LENGTHS.tolist()
    if file is not None:
        assert file.stat().st_size == buffer.data.nbytes
        assert file.stat().st_blocks * 512 >= buffer.data.nbytes  # taken, not only promised
        buffer.data[4] = 1
        assert isinstance(buffer.data, np.memmap)
        buffer.data.flush()
        assert np.fromfile(file, dtype).reshape(15, 3)[4].tolist() == [1, 1, 1]


def test_no_tokens(tmp_path):
    for file in (None, tmp_path / "buffer"):
        buffer = buffers.create(np.array([0, 0]), 3, np.dtype(np.float32), file)
        assert buffer.data.shape == (0, 3)
        assert not buffers.read_batch(buffer, Batch(np.array([0]), (4,))).any()


def test_read_batch_pads_with_zeros(filled):
    read = buffers.read_batch(filled, BATCH)
    assert read.shape == (3, 8, 2)
    expected = np.zeros((3, 8, 2), np.float32)
    expected[0, :7] = np.arange(8, 22).reshape(7, 2)
    expected[2, :3] = np.arange(6).reshape(3, 2)
    np.testing.assert_array_equal(read, expected)


def test_write_batch_drops_padding(filled):
    values = np.full((3, 8, 2), -1, np.float32)
    values[0] = 50
    buffers.write_batch(filled, BATCH, values)
    expected = np.arange(30, dtype=np.float32).reshape(15, 2)
    expected[4:11], expected[:3] = 50, -1
    np.testing.assert_array_equal(filled.data, expected)


def test_sides_have_their_own_lengths(filled):
    batch = Batch(np.array([1, 3]), (64, 4))
    assert buffers.read_batch(filled, batch, side=1).shape == (2, 4, 2)
    assert buffers.read_batch(filled, batch).shape == (2, 64, 2)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", [None, "buffer"])
def test_batches_round_trip(dtype, name, tmp_path):
    source = _filled(dtype)
    file = None if name is None else tmp_path / name
    target = buffers.create(OFFSETS, 2, np.dtype(dtype), file)
    for batch in buffers.length_batches(LENGTHS[:, None], 2 * LENGTH_MULTIPLE):
        buffers.write_batch(target, batch, buffers.read_batch(source, batch))
    assert target.data.tobytes() == source.data.tobytes()


@pytest.mark.parametrize(
    "read",
    [
        lambda buffer: buffers.read_batch(buffer, Batch(np.array([2]), (7,))),
        lambda buffer: buffers.read_batch(buffer, Batch(np.array([2, 0]), (64,))),
        lambda buffer: buffers.read_rows(buffer.data, np.arange(15), 15),
        lambda buffer: buffers.read_rows(buffer.data, np.array([5]), 4),
    ],
)
def test_what_jax_is_given_is_a_copy(read, filled):
    """JAX may keep a NumPy array's own memory; that must never be the buffer's."""
    found = read(filled)
    assert type(found) is np.ndarray
    assert not np.shares_memory(found, filled.data)
    on_device = jnp.asarray(found)
    before = np.array(on_device)
    filled.data[:] = -7
    np.testing.assert_array_equal(on_device, before)
    assert (before >= 0).all()


def test_read_rows(filled):
    read = buffers.read_rows(filled.data, np.array([14, 0, 3]), 5)
    np.testing.assert_array_equal(read[:3], filled.data[[14, 0, 3]])
    assert read.shape == (5, 2)
    assert not read[3:].any()
    assert not buffers.read_rows(filled.data, np.array([], np.int64), 4).any()
    probabilities = np.arange(15, dtype=ml_dtypes.bfloat16)
    assert buffers.read_rows(probabilities, np.array([9, 2]), 3).tolist() == [9, 2, 0]
    with pytest.raises(ValueError):
        buffers.read_rows(filled.data, np.arange(6), 5)


@st.composite
def _lengths(draw):
    samples, sides = draw(st.integers(0, 40)), draw(st.integers(1, 2))
    values = draw(st.lists(st.integers(0, 400), min_size=samples * sides, max_size=samples * sides))
    return np.array(values, np.int64).reshape(samples, sides)


@given(_lengths(), st.integers(1, 3000))
@settings(max_examples=150, deadline=None)
def test_length_batches_cover_every_sample_once(lengths, batch_tokens):
    batches = buffers.length_batches(lengths, batch_tokens)
    samples = np.concatenate([batch.samples for batch in batches] or [np.array([], np.int64)])
    assert sorted(samples[samples >= 0]) == list(range(len(lengths)))
    shapes = {}
    for batch in batches:
        chosen = batch.samples[batch.samples >= 0]
        assert len(chosen)
        assert len(batch.padded) == lengths.shape[1]
        for side, padded in enumerate(batch.padded):
            assert padded % LENGTH_MULTIPLE == 0
            over = padded - lengths[chosen, side]
            assert (over >= 0).all()
            assert ((over < LENGTH_MULTIPLE) | (padded == LENGTH_MULTIPLE)).all()
        size = len(batch.samples)
        assert size == 1 or size * max(batch.padded) <= batch_tokens
        assert shapes.setdefault(batch.padded, size) == size  # one compiled shape each


def test_length_batches_fill_up():
    batches = buffers.length_batches(np.array([[64], [1], [65], [2], [3]]), 128)
    found = [(batch.samples.tolist(), batch.padded) for batch in batches]
    assert found == [([0, 1], (64,)), ([3, 4], (64,)), ([2], (128,))]
    batches = buffers.length_batches(np.full((3, 2), 5), 128)
    assert [batch.samples.tolist() for batch in batches] == [[0, 1], [2, -1]]
    (batch,) = buffers.length_batches(np.full((3, 2), 5), 10**6)
    assert batch.samples.tolist() == [0, 1, 2]


def test_an_existing_file_is_kept(tmp_path):
    (tmp_path / "buffer").write_text("mine")
    message = r"buffer cannot take 120 bytes of activations \(File exists\): remove it.*BUFFER_DIR"
    with pytest.raises(FileExistsError, match=message):
        _filled(file=tmp_path / "buffer")
    assert (tmp_path / "buffer").read_text() == "mine"


def test_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no/buffer cannot take 120 bytes.*BUFFER_DIR"):
        _filled(file=tmp_path / "no" / "buffer")


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="space is taken by writing")
def test_a_full_disk_shows_at_once(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    offsets = np.array([0, 10**9])
    message = r"buffer cannot take 4,000,000,000,000 bytes .*No space left.*set BUFFER_DIR to"
    with pytest.raises(OSError, match=message) as caught:
        buffers.create(offsets, 1000, np.dtype(np.float32), tmp_path / "buffer")
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_without_fallocate_zeros_are_written(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr(buffers, "_PIECE", 50)
    buffer = _filled(file=tmp_path / "buffer")
    assert (tmp_path / "buffer").stat().st_size == 120
    assert (tmp_path / "buffer").stat().st_blocks > 0
    np.testing.assert_array_equal(buffer.data, _filled().data)
