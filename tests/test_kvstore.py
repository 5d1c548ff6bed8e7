# SPDX-License-Identifier: Apache-2.0
"""Local paths and URLs open as the same key-value stores."""

import pathlib

import pytest

from qmoe_jax.checkpoints import kvstore
from qmoe_jax.checkpoints.errors import CheckpointError


def test_locations():
    assert kvstore.location(pathlib.Path("/a/b/../c/")) == "/a/c"
    assert kvstore.location("relative") == str(pathlib.Path.cwd() / "relative")
    assert kvstore.location("gs://bucket/a/") == "gs://bucket/a"


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_reads_and_lists(prefix, tmp_path):
    for name in ("step_1/x", "step_2/deep/y", "stop", "other"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    store = kvstore.open_store(f"{prefix}{tmp_path}")
    assert kvstore.read_files(store, ["other", "none", "step_1"]) == [b"other", None, None]
    assert sorted(kvstore.list_files(store, "step_")) == ["step_1/x", "step_2/deep/y"]


@pytest.mark.parametrize(
    "url", ["gs://bucket/a", "s3://bucket/a", "https://example.com/a", "http://example.com/a"]
)
def test_remote_kinds_are_known(url, monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert kvstore.open_store(url).path.strip("/").startswith("a")


def test_unknown_kind():
    with pytest.raises(CheckpointError, match=r"foo://bucket/a.*Give a local path or"):
        kvstore.open_store("foo://bucket/a")


def test_stores_that_cannot_be_listed():
    store = kvstore.open_store("http://localhost:1/a")
    with pytest.raises(CheckpointError, match="Give the directory of one step"):
        kvstore.list_files(store, "checkpoint_")


def test_unreadable_files(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    store = kvstore.open_store(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"cannot read `loop`.*Check that the path"):
        kvstore.read_files(store, ["loop"])


def test_reasons_are_one_line():
    page = RuntimeError(
        "failed [tensorstore_spec='...']\n[os_error_code='27'] [source locations=...]"
    )
    assert kvstore.reason(page) == "File too large"
    assert kvstore.reason(ValueError("not\n  found")) == "not found"
    shown = kvstore.reason(ValueError("begins so" + 5000 * "x" + "ends so"))
    assert len(shown) < 700
    assert shown.startswith("begins so") and shown.endswith("ends so")
