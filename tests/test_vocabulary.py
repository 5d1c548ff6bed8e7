# SPDX-License-Identifier: Apache-2.0
from tiny_tokenizers import sentencepiece_model

from qmoe_jax.calibration import tokenizer
from qmoe_jax.calibration.text import Text
from qmoe_jax.runs import vocabulary


def test_what_is_kept_needs_no_extra_ids(tmp_path):
    plain = tmp_path / "plain.model"
    plain.write_bytes(sentencepiece_model())
    vocabulary.keep(Text(str(plain), extra_ids=10), tmp_path / "pack")
    vocabulary.copy(tmp_path / "pack", tmp_path / "copy")
    kept = tokenizer.load_tokenizer(tmp_path / "copy" / tokenizer.FILE)
    given = tokenizer.load_tokenizer(plain, 10)
    assert kept.num_sentinels == 10
    text = "list <extra_id_0> of <extra_id_9>"
    assert kept.encode(text).tolist() == given.encode(text).tolist()
    vocabulary.copy(tmp_path / "nothing", tmp_path / "empty")
    assert not (tmp_path / "empty").exists()
