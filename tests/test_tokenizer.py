# SPDX-License-Identifier: Apache-2.0
"""Both spellings of T5's sentinels, and every way in which a vocabulary can be unfit."""

import numpy as np
import pytest
import sentencepiece
from tiny_tokenizers import sentencepiece_model, with_pieces

from qmoe_jax.calibration import tokenizer as tokenizers

PIECES, SENTINELS = 200, 10
TEXT = "The <extra_id_0> of a class <extra_id_1> is a function."


def with_names(names):
    return with_pieces(sentencepiece_model(PIECES), list(names))


@pytest.fixture
def load(tmp_path):
    def load_bytes(model, extra_ids=None):
        path = tmp_path / "sentencepiece.model"
        path.write_bytes(model)
        return tokenizers.load_tokenizer(path, extra_ids)

    return load_bytes


def test_sentinels_inside_and_appended_are_one_vocabulary(load):
    inside = load(with_names([f"▁<extra_id_{i}>" for i in reversed(range(SENTINELS))]), 0)
    appended = load(sentencepiece_model(PIECES), SENTINELS)
    for tokenizer in (inside, appended):
        assert tokenizer.vocab_size == PIECES + SENTINELS
        assert tokenizer.num_sentinels == SENTINELS
        assert tokenizer.first_sentinel_id == PIECES + SENTINELS - 1
        assert tokenizer.lowest_sentinel_id == PIECES
        assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    np.testing.assert_array_equal(inside.encode(TEXT), appended.encode(TEXT))


def test_switch_vocabulary_has_32100_ids(load):
    # The published sizes: 32,000 pieces and 100 sentinels.
    filler = [f"filler{i}" for i in range(32000 - PIECES)]
    tokenizer = load(with_pieces(sentencepiece_model(PIECES), filler, score=-100.0, kind=1), 100)
    assert tokenizer.vocab_size == 32100
    assert tokenizer.lowest_sentinel_id == 32000
    assert tokenizer.first_sentinel_id == 32099
    assert tokenizer.encode("<extra_id_0> a <extra_id_99>").tolist()[::2] == [32099, 32000]


@pytest.mark.parametrize("prefix", ["", "▁"])
@pytest.mark.parametrize("step", [1, -1])
def test_names_and_order_of_sentinels_inside(load, prefix, step):
    tokenizer = load(with_names([f"{prefix}<extra_id_{i}>" for i in range(SENTINELS)][::step]))
    assert tokenizer.num_sentinels == SENTINELS
    assert tokenizer.first_sentinel_id == PIECES + SENTINELS - 1


def test_text_survives(load):
    tokenizer = load(sentencepiece_model(PIECES), SENTINELS)
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == TEXT
    assert [i for i in ids if i >= tokenizer.lowest_sentinel_id] == [209, 208]


def test_batch_encodes_as_one_by_one(load):
    tokenizer = load(sentencepiece_model(PIECES), SENTINELS)
    texts = [TEXT, "", "An object's type"]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_decoding_stops_at_eos_and_survives_pads_and_unknown_ids(load):
    tokenizer = load(sentencepiece_model(PIECES), SENTINELS)
    word = tokenizer.encode("class")
    assert tokenizer.decode([0, *word, tokenizer.eos_id, *word]) == "class"
    unknown = tokenizer.decode([tokenizer.unk_id])
    assert tokenizer.decode(np.asarray([tokenizer.vocab_size + 27])) == unknown
    assert tokenizer.decode([]) == ""


def test_appended_pieces_are_seqios():
    model = sentencepiece.SentencePieceProcessor()
    model.load_from_serialized_proto(
        tokenizers.with_sentinels(sentencepiece_model(PIECES), SENTINELS)
    )
    ids = range(PIECES, PIECES + SENTINELS)
    # SeqIO: vocabularies.py, SentencePieceVocabulary._load_model.
    names = [f"▁<extra_id_{i}>" for i in reversed(range(SENTINELS))]
    assert model.get_piece_size() == PIECES + SENTINELS
    assert [model.id_to_piece(i) for i in ids] == names
    assert [model.get_score(i) for i in ids] == [0.0] * SENTINELS
    assert not any(model.is_control(i) or model.is_unused(i) or model.is_byte(i) for i in ids)


def test_fits(load):
    tokenizer = load(sentencepiece_model(PIECES), SENTINELS)
    tokenizers.check_fits(tokenizer, PIECES + SENTINELS)
    with pytest.raises(ValueError, match=r"has 210 ids .* embedding has 209 rows"):
        tokenizers.check_fits(tokenizer, PIECES + SENTINELS - 1)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer file .*absent\.model"):
        tokenizers.load_tokenizer(tmp_path / "absent.model")


@pytest.mark.parametrize("model", [b"", b"hello", b"\x00" * 64])
def test_other_files(load, model):
    with pytest.raises(ValueError, match=r"sentencepiece\.model is not a SentencePiece model"):
        load(model)


@pytest.mark.parametrize("extra_ids", [None, 0])
def test_no_sentinels(load, extra_ids):
    with pytest.raises(ValueError, match="holds no `<extra_id_0>`: pass `extra_ids`"):
        load(sentencepiece_model(PIECES), extra_ids)


def test_sentinels_twice(load):
    with pytest.raises(ValueError, match="already holds 2 sentinels: leave out"):
        load(with_names(["<extra_id_1>", "<extra_id_0>"]), 2)


def test_negative_extra_ids(load):
    with pytest.raises(ValueError, match="`extra_ids` must not be negative, but is -1"):
        load(sentencepiece_model(PIECES), -1)


@pytest.mark.parametrize(
    "names", [["<extra_id_0>", "more"], ["<extra_id_0>", "between", "<extra_id_1>"]]
)
def test_sentinels_not_at_the_end(load, names):
    with pytest.raises(ValueError, match=r"the last of its 20[23] ids"):
        load(with_names(names))


def test_no_eos(load):
    with pytest.raises(ValueError, match="has no EOS token: train it with `eos_id=1`"):
        load(sentencepiece_model(PIECES, eos_id=-1, unk_id=1), SENTINELS)


def test_id_0_is_not_for_padding(load):
    with pytest.raises(ValueError, match=r"id 0 .* is '<unk>', but T5 pads with 0"):
        load(sentencepiece_model(PIECES, pad_id=-1, unk_id=0), SENTINELS)
