# SPDX-License-Identifier: Apache-2.0
"""The packed store: what was committed is what is read, and a store is whole or refused."""

import dataclasses
import errno
import json
import os
import pathlib

import ml_dtypes
import numpy as np
import pytest
import tiny_stores
from tiny_stores import CONFIG, GATED, GROUPS, PLACES, Kind

from pallas_kernels import packed as packed_lib
from qmoe_jax.checkpoints import array_files, packed, packed_arrays, packed_manifest
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.codec import uniform
from qmoe_jax.models import config as configs

BFLOAT16 = ml_dtypes.bfloat16
KINDS = [
    Kind("qmoe"),
    Kind("qmoe", dtype=BFLOAT16, config=GATED),
    Kind("tunstall"),
    Kind("uniform", 2),
    Kind("uniform", 3, 16, BFLOAT16),
    Kind("uniform", 4, 1),
    Kind("uniform", 4, 64),  # wider than the matrix
    Kind("dense"),
    Kind("dense", 3, 16, BFLOAT16, GATED),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.codec}-{kind.bits}")
def test_round_trip(kind, tmp_path):
    path = tmp_path / "new" / "packed"
    finished = tiny_stores.write(path, kind)
    checkpoint = packed.open_checkpoint(path)
    assert checkpoint == finished
    assert checkpoint.header == tiny_stores.header(kind)
    read = packed.read_params(checkpoint, list(checkpoint.params))
    assert read.keys() == tiny_stores.params(kind).keys()
    for name, array in tiny_stores.params(kind).items():
        tiny_stores.assert_same(read[name], array)
    for place in PLACES:
        groups = list(packed.read_groups(checkpoint, *place))
        assert [(group.start, group.stop) for group, _ in groups] == list(GROUPS)
        for bounds, (_, found) in zip(GROUPS, groups, strict=True):
            assert tuple(found) == configs.expert_matrices(kind.config)
            for matrix, record in tiny_stores.experts(kind, place, bounds).items():
                tiny_stores.assert_same(found[matrix], record)
    assert {file.name for file in path.iterdir()} == {
        "experts",
        "journal.jsonl",
        "manifest.json",
        "params",
    }
    assert not list(path.rglob("*.tmp"))


@pytest.fixture(scope="module")
def ternary(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("ternary") / "packed"
    tiny_stores.write(path, Kind("qmoe"))
    return path


def test_read_params_by_name(ternary):
    checkpoint = packed.open_checkpoint(ternary)
    with pytest.raises(CheckpointError, match="has no parameter `encoder/none`"):
        packed.read_params(checkpoint, ("encoder/encoder_norm/scale", "encoder/none"))


@pytest.mark.parametrize("words, dtype", [(2**16 - 1, np.uint16), (2**16, np.uint32)])
def test_long_rows_have_wide_lengths(words, dtype):
    row, columns = np.zeros(words, np.uint16), 2 * words  # word 0 is one pair of zeros
    starts, values = np.array([[0, words]], np.uint32), np.ones((1, 1, 2), BFLOAT16)
    record = packed_lib.assemble([row], starts, values, columns, "qmoe")
    arrays = packed_arrays.to_arrays(record)
    assert arrays["row_lengths"].dtype == dtype
    found = packed_arrays.from_arrays(arrays, "qmoe", uniform.WHOLE_ROW, (1, columns, 1))
    tiny_stores.assert_same(found, record)


def test_what_would_not_come_back_is_refused(tmp_path):
    packed.create(tmp_path / "p", tiny_stores.header(Kind("uniform", 3)))
    records = tiny_stores.experts(Kind("uniform", 3), PLACES[0], GROUPS[0])
    for changes in (
        {"scale": np.full((2, 41, 1), 1.001, np.float32)},
        {"scale": np.full((2, 41, 1), np.inf, np.float32)},
        {"zero": np.full((2, 41, 1), -1, np.float32)},
        {"zero": np.full((2, 41, 1), 0.5, np.float32)},
        {"zero": np.full((2, 41, 1), np.nan, np.float32)},
    ):
        damaged = records | {"wi": dataclasses.replace(records["wi"], **changes)}
        (name,) = changes
        with pytest.raises(
            ValueError, match=f"`{name}` holds values that are not finite and exact"
        ):
            packed.commit_experts(tmp_path / "p", "encoder", 1, 0, damaged)
    one = tiny_stores.experts(Kind("uniform", 3), PLACES[0], GROUPS[1])
    with pytest.raises(ValueError, match=r"equally many experts, got \{'wi': 2, 'wo': 1\}"):
        packed.commit_experts(tmp_path / "p", "encoder", 1, 0, records | {"wo": one["wo"]})
    assert [file.name for file in (tmp_path / "p").iterdir()] == ["journal.jsonl"]


def test_create_refuses_what_is_there(ternary, tmp_path):
    header = tiny_stores.header(Kind("qmoe"))
    (tmp_path / "empty").mkdir()
    packed.create(tmp_path / "empty", header)
    (tmp_path / "file").write_text("x")
    states = {
        ternary: "a finished packed checkpoint",
        tmp_path / "empty": "an unfinished packed checkpoint",
        tmp_path: "other files",
        tmp_path / "file": "other files",
    }
    for path, state in states.items():
        with pytest.raises(
            CheckpointError, match=rf"{path} holds {state}: choose a new OUTPUT_DIR"
        ):
            packed.create(path, header)
    no_sizes = dataclasses.replace(header, config=dataclasses.replace(CONFIG, num_heads=0))
    with pytest.raises(ValueError, match="model size `num_heads` is 0"):
        packed.create(tmp_path / "new", no_sizes)
    assert not (tmp_path / "new").exists()


COMMITS = list(range(len(GROUPS) * len(PLACES) + 4))


@pytest.mark.parametrize("left_out", COMMITS)
def test_finish_refuses_an_incomplete_store(left_out, tmp_path):
    kind = Kind("dense")
    packed.create(tmp_path / "p", tiny_stores.header(kind))
    commits = list(tiny_stores.commits(kind))
    assert len(commits) == len(COMMITS)
    for number, (commit, *arguments) in enumerate(commits):
        if number != left_out:
            commit(tmp_path / "p", *arguments)
    message = (
        r"journal\.jsonl is not that of a complete checkpoint .*(has 2 exp|expert 0 exp|nothing)"
    )
    with pytest.raises(CheckpointError, match=message):
        packed.finish(tmp_path / "p")
    with pytest.raises(CheckpointError, match="it is not finished: the `compress` that began"):
        packed.open_checkpoint(tmp_path / "p")
    commit, *arguments = commits[left_out]
    commit(tmp_path / "p", *arguments)
    assert packed.finish(tmp_path / "p") == packed.open_checkpoint(tmp_path / "p")


@pytest.mark.parametrize(
    "kind, message",
    [
        (Kind("uniform", 3, 16), "wi/codes"),  # the header says dense
        (Kind("dense", config=dataclasses.replace(GATED, logits_via_embedding=True)), "wi_0"),
        (Kind("dense", config=dataclasses.replace(CONFIG, emb_dim=36)), r"\(11, 36\)"),
    ],
)
def test_finish_refuses_other_arrays(kind, message, tmp_path):
    packed.create(tmp_path / "p", tiny_stores.header(Kind("dense")))
    for commit, *arguments in tiny_stores.commits(kind):
        commit(tmp_path / "p", *arguments)
    with pytest.raises(CheckpointError, match=message):
        packed.finish(tmp_path / "p")


def test_finish_refuses_a_torn_journal_and_missing_files(tmp_path):
    tiny_stores.write(tmp_path / "p", Kind("dense"))
    (tmp_path / "p/manifest.json").unlink()
    journal = (tmp_path / "p/journal.jsonl").read_bytes()
    for damaged in (journal[:-20], b"", journal.replace(b'"dense"', b'"zip"')):
        (tmp_path / "p/journal.jsonl").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="not that of a complete checkpoint"):
            packed.finish(tmp_path / "p")
    (tmp_path / "p/journal.jsonl").write_bytes(journal)
    (tmp_path / "p/params/outer.bin").unlink()
    with pytest.raises(CheckpointError, match=r"outer\.bin is missing, expected \d+ bytes"):
        packed.finish(tmp_path / "p")
    (tmp_path / "p/journal.jsonl").unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        packed.finish(tmp_path / "p")
    assert not packed.is_packed(tmp_path / "p")


def test_open_says_what_is_wrong(tmp_path):
    path = tmp_path / "p"
    with pytest.raises(CheckpointError, match=r"p has no manifest\.json: it is not a packed"):
        packed.open_checkpoint(path)
    tiny_stores.write(path, Kind("dense"))
    manifest = json.loads((path / "manifest.json").read_bytes())
    file = path / "experts/encoder.layers_1.0000-0001.bin"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    message = rf"bin has {len(content) - 1} bytes, expected {len(content)} bytes: restore it"
    with pytest.raises(CheckpointError, match=message):
        packed.open_checkpoint(path)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"0000-0001\.bin is missing, expected"):
        packed.open_checkpoint(path)
    file.write_bytes(content)
    packed.open_checkpoint(path)
    (path / "manifest.json").write_bytes(tiny_stores.seal(manifest | {"version": 2}))
    with pytest.raises(CheckpointError, match="has format version 2, this release reads 1"):
        packed.open_checkpoint(path)
    (path / "manifest.json").unlink()
    assert packed.is_packed(path)
    with pytest.raises(CheckpointError, match="it is not finished"):
        packed.open_checkpoint(path)


def test_the_journal_is_not_needed_once_finished(tmp_path):
    expected = tiny_stores.write(tmp_path / "p", Kind("dense"))
    (tmp_path / "p/journal.jsonl").unlink()
    assert packed.open_checkpoint(tmp_path / "p") == expected


@pytest.mark.parametrize("byte", [0, 100, -1])
def test_flipped_bytes_are_named(byte, tmp_path):
    checkpoint = tiny_stores.write(tmp_path / "p", Kind("dense"))
    for name in ("experts/encoder.layers_1.0000-0001.bin", "params/encoder.layers_0.bin"):
        content = bytearray((tmp_path / "p" / name).read_bytes())
        content[byte] ^= 1
        (tmp_path / "p" / name).write_bytes(content)
    checkpoint = packed.open_checkpoint(tmp_path / "p")
    with pytest.raises(CheckpointError, match=r"0000-0001\.bin: array `w[io]/kernel` is damaged"):
        packed.read_group(checkpoint, checkpoint.groups["encoder", 1][0])
    layer = [name for name in checkpoint.params if name.startswith("encoder/layers_0/")]
    with pytest.raises(CheckpointError, match=r"layers_0\.bin: array `encoder/layers_0/.*damaged"):
        packed.read_params(checkpoint, layer)
    packed.read_group(checkpoint, checkpoint.groups["encoder", 1][1])


def _commit_again(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> packed.PackedCheckpoint:
    """Other arrays in the first encoder group, with checksums to match."""
    name = "experts/encoder.layers_1.0000-0001.bin"
    manifest = json.loads((path / "manifest.json").read_bytes())
    entry = next(entry for entry in manifest["entries"] if entry["file"]["name"] == name)
    entry["file"] = array_files.to_json(array_files.write_arrays(path, name, arrays))
    (path / "manifest.json").write_bytes(tiny_stores.seal(manifest))
    return packed.open_checkpoint(path)


def _arrays(checkpoint: packed.PackedCheckpoint) -> dict[str, np.ndarray]:
    file = checkpoint.groups["encoder", 1][0].file
    return {key: array_files.read_array(checkpoint.path, file, key) for key in file.arrays}


def _longer_word(arrays):
    arrays["wi/codes"][5] = 11 if arrays["wi/codes"][5] != 11 else 0


def _moved_boundary(arrays):
    arrays["wi/row_lengths"][1, 3] += 1
    arrays["wi/row_lengths"][1, 4] -= 1


def _missing_word(arrays):
    arrays["wi/codes"] = arrays["wi/codes"][:-1].copy()


def _empty_row(arrays):
    lengths = arrays["wi/row_lengths"]
    lengths[0, 0], lengths[0, 1] = 0, lengths[0, 0] + lengths[0, 1]


def _huge_rows(arrays):
    arrays["wi/row_lengths"] = np.full((2, 41), 2**32 - 1, np.uint32)


def _infinite_value(arrays):
    arrays["wi/row_values"][1, 2, 0] = np.inf


def _all_words_of_four(arrays):
    words = int(arrays["wi/row_lengths"][0].sum())
    arrays["wi/codes"][:words] = np.uint16(2**16 - 1)


def _other_count(arrays):
    arrays["wi/nonzeros"] += np.array([-1, 1]).astype(np.uint32)


def _unknown_tree(arrays):
    arrays["wi/trees"][1] = 4


@pytest.mark.parametrize(
    "codec, damage, message",
    [
        ("qmoe", _longer_word, "expert 0, row .*words expand to"),
        ("qmoe", _moved_boundary, "expert 1, row 3: words expand to"),
        ("qmoe", _missing_word, r"its rows have \d+ words, its codes \d+"),
        ("qmoe", _empty_row, "must begin at 0 and rise"),
        ("qmoe", _huge_rows, "its rows have"),
        ("qmoe", _infinite_value, "`row_values` of expert 1, row 2 are not finite"),
        ("tunstall", _moved_boundary, "expert 1, row 3: a word reaches past its 35 columns"),
        ("tunstall", _all_words_of_four, "`nonzeros` are not those"),
        ("tunstall", _missing_word, r"its rows have \d+ words, its codes \d+"),
        ("tunstall", _huge_rows, "its rows have"),
        ("tunstall", _infinite_value, "`row_values` of expert 1, row 2 are not finite"),
        ("tunstall", _other_count, "`nonzeros` are not those of its words|its rows have"),
        ("tunstall", _unknown_tree, "`trees` must be below 4, got 4"),
    ],
)
def test_damage_with_a_new_checksum_reaches_no_kernel(codec, damage, message, tmp_path):
    arrays = _arrays(tiny_stores.write(tmp_path / "p", Kind(codec)))
    damage(arrays)
    checkpoint = _commit_again(tmp_path / "p", arrays)
    named = rf"layers_1\.0000-0001\.bin: `wi` is not what the manifest says \(.*{message}"
    with pytest.raises(CheckpointError, match=named):
        packed.load_experts(checkpoint, "encoder", 1)
    packed.load_experts(checkpoint, "decoder", 0)


def test_five_bit_planes(tmp_path):
    arrays = _arrays(tiny_stores.write(tmp_path / "p", Kind("uniform", 3)))
    arrays["wo/codes"] = np.zeros((*arrays["wo/codes"].shape[:3], 5), np.uint32)
    checkpoint = _commit_again(tmp_path / "p", arrays)
    with pytest.raises(CheckpointError, match=r"`wo` is not .*`bits` must be one of \(2, 3, 4\)"):
        packed.read_group(checkpoint, checkpoint.groups["encoder", 1][0])


@pytest.mark.parametrize("step", ["array file", "rename", "journal"])
def test_after_a_full_disk_the_store_goes_on(step, tmp_path, monkeypatch):
    """A commit that failed leaves those before it, and can be repeated."""
    path, kind = tmp_path / "p", Kind("dense")
    packed.create(path, tiny_stores.header(kind))
    commits = list(tiny_stores.commits(kind))
    for commit, *arguments in commits[:3]:
        commit(path, *arguments)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "journal":
        real, journal = os.fsync, (path / packed.JOURNAL).stat().st_ino

        def fsync(descriptor):
            return full() if os.fstat(descriptor).st_ino == journal else real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
    else:
        monkeypatch.setattr(os, "fsync" if step == "array file" else "replace", full)
    before = sorted(path.rglob("*"))
    commit, *arguments = commits[3]
    message = r"cannot be written \(No space left on device\): free space .* another OUTPUT_DIR"
    with pytest.raises(CheckpointError, match=message):
        commit(path, *arguments)
    monkeypatch.undo()
    new = {"experts/encoder.layers_1.0000-0001.bin"} if step == "journal" else set()
    assert {f"{p.relative_to(path)}" for p in path.rglob("*") if p not in before} == new
    entries = packed_manifest.from_journal((path / packed.JOURNAL).read_bytes())["entries"]
    assert len(entries) == 3
    for commit, *arguments in commits[3:]:
        commit(path, *arguments)
    checkpoint = packed.finish(path)
    for place in PLACES:
        for bounds, (_, found) in zip(GROUPS, packed.read_groups(checkpoint, *place), strict=True):
            for matrix, record in tiny_stores.experts(kind, place, bounds).items():
                tiny_stores.assert_same(found[matrix], record)


def test_a_manifest_that_cannot_be_written(tmp_path, monkeypatch):
    tiny_stores.write(tmp_path / "p", Kind("dense"))
    (tmp_path / "p/manifest.json").unlink()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be written"):
        packed.finish(tmp_path / "p")
    monkeypatch.undo()
    assert not (tmp_path / "p/manifest.json").exists()
    packed.finish(tmp_path / "p")
