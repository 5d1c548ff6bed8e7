# SPDX-License-Identifier: Apache-2.0
import pytest
import tiny_stores
from tiny_stores import Kind

from qmoe_jax.calibration.text import Text
from qmoe_jax.checkpoints import formats, orbax_pack_writer
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.runs import evaluate, import_pack


def test_each_format_is_told_by_its_files(data_dir, tmp_path):
    store = tiny_stores.write(tmp_path / "store", Kind("qmoe"))
    orbax_pack_writer.save(tmp_path / "orbax", store)
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface" / "config.json").write_text('{"model_type": "switch_transformers"}')
    found = {
        "packed": tmp_path / "store",
        "orbax": tmp_path / "orbax",
        "published": data_dir / "qmoe" / "tiny_qmoe_ckpt",
        "huggingface": tmp_path / "huggingface",
        "t5x": tmp_path / "nothing",
    }
    assert {str(formats.detect(path)): path for path in found.values()} == found
    assert formats.detect("gs://bucket/model") == "t5x"


def test_a_packed_checkpoint_is_not_imported(tmp_path):
    tiny_stores.write(tmp_path / "store", Kind("qmoe"))
    with pytest.raises(CheckpointError, match="store is a packed checkpoint already"):
        import_pack.import_pack(str(tmp_path / "store"), str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match=r"neither a pack .*`noexp.pt`.* need no import"):
        import_pack.import_pack(str(tmp_path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_to_urls(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pack = str(data_dir / "qmoe" / "tiny_qmoe_ckpt")
    with pytest.raises(CheckpointError, match=r"cannot write to gs://bucket/x: .*local folder"):
        import_pack.import_pack(pack, "gs://bucket/x")
    with pytest.raises(CheckpointError, match="cannot write to s3://bucket/x"):
        evaluate.evaluate(pack, Text("model", ()), eval_output_dir="s3://bucket/x")
    assert not list(tmp_path.iterdir())
