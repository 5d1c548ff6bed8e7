# SPDX-License-Identifier: Apache-2.0
"""A store in another codec holds the same weights, and converting back gives the same files."""

import dataclasses
import pathlib

import numpy as np
import pytest
import tiny_stores
from tiny_stores import GATED, Kind

from qmoe_jax.checkpoints import packed, packed_convert, source
from qmoe_jax.checkpoints.errors import CheckpointError


def array_files(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.bin"))}


@pytest.mark.parametrize("pieces", [1, 2], ids=["experts one by one", "whole groups"])
@pytest.mark.parametrize("config", [tiny_stores.CONFIG, GATED], ids=["relu", "gated"])
def test_there_and_back(config, pieces, tmp_path, monkeypatch):
    monkeypatch.setattr(packed_convert, "_WEIGHTS", pieces * config.emb_dim * config.expert_mlp_dim)
    store = tiny_stores.write(tmp_path / "a", Kind("qmoe", config=config))
    seen = []
    other = packed_convert.convert(
        store, tmp_path / "b", "tunstall", committed=lambda *what: seen.append(what)
    )
    assert other.header == dataclasses.replace(store.header, codec="tunstall")
    assert len(seen) == len(store.files)
    assert sum(done for _, done in seen) == len(store.groups)
    one, two = (source.all_params(source.open_source(tmp_path / name)) for name in "ab")
    assert one.keys() == two.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(two[name], array, strict=True)
    packed_convert.convert(other, tmp_path / "c", "qmoe")
    assert array_files(tmp_path / "c") == array_files(tmp_path / "a")
    assert packed.open_checkpoint(tmp_path / "c").header == store.header


def test_it_is_what_packing_the_weights_would_give(tmp_path):
    store = tiny_stores.write(tmp_path / "a", Kind("qmoe"))
    packed_convert.convert(store, tmp_path / "b", "tunstall")
    tiny_stores.write(tmp_path / "c", Kind("tunstall"))
    assert array_files(tmp_path / "b") == array_files(tmp_path / "c")


def test_only_ternary_experts_have_codecs(tmp_path):
    store = tiny_stores.write(tmp_path / "a", Kind("uniform", 3))
    with pytest.raises(CheckpointError, match="is of codec 'uniform', expected one of"):
        packed_convert.convert(store, tmp_path / "b", "tunstall")
    assert not (tmp_path / "b").exists()


def test_a_damaged_word_is_found(tmp_path):
    store = tiny_stores.write(tmp_path / "a", Kind("qmoe"))
    file = tmp_path / "a" / "experts" / "decoder.layers_0.0002-0002.bin"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"0002-0002\.bin: array .* is damaged"):
        packed_convert.convert(store, tmp_path / "b", "tunstall")
    assert not (tmp_path / "b" / "manifest.json").exists()
