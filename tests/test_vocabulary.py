# SPDX-License-Identifier: Apache-2.0
import pytest
from tiny_tokenizers import sentencepiece_model

from qmoe_jax.calibration import tokenizer
from qmoe_jax.checkpoints import vocabulary


def test_what_is_kept_needs_no_extra_ids(tmp_path):
    plain = tmp_path / "plain.model"
    plain.write_bytes(sentencepiece_model())
    given = tokenizer.load_tokenizer(plain, 10)
    vocabulary.keep(given.model, tmp_path / "pack")
    vocabulary.copy(tmp_path / "pack", tmp_path / "copy")
    kept = tokenizer.load_tokenizer(tmp_path / "copy" / vocabulary.FILE)
    assert kept.num_sentinels == 10
    text = "list <extra_id_0> of <extra_id_9>"
    assert kept.encode(text).tolist() == given.encode(text).tolist()
    vocabulary.copy(tmp_path / "nothing", tmp_path / "empty")
    assert not (tmp_path / "empty").exists()
    assert vocabulary.kept(tmp_path / "pack") == str(tmp_path / "pack" / vocabulary.FILE)
    for place in (tmp_path / "empty", "gs://bucket/checkpoint_1", "https://host/checkpoint_1"):
        with pytest.raises(ValueError, match="give SENTENCEPIECE_MODEL_FILE"):
            vocabulary.kept(place)
