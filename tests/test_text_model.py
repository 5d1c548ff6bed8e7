# SPDX-License-Identifier: Apache-2.0
"""Text in, text out; of a model that T5X wrote, whose weights are random."""

import jax
import numpy as np
import pytest
import tiny_stores
from tiny_stores import Kind

from qmoe_jax.checkpoints import vocabulary
from qmoe_jax.inference import decoding, prompts, scoring, text_model
from qmoe_jax.inference.beam_search import Beams, beam_search
from qmoe_jax.inference.decoding import Sampling
from qmoe_jax.inference.text_model import TextModel

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS = ["The <extra_id_0> of a list.", "x", "Return <extra_id_0> and <extra_id_1> as they are."]


@pytest.fixture(scope="module")
def model(data_dir) -> TextModel:
    path = data_dir / "t5x" / "tiny_switch_base" / "legacy"
    return text_model.load(path, sentencepiece_model_file=data_dir / "text" / "sentencepiece.model")


def ids(model, texts):
    return prompts.encode(texts, model.vocabulary)[0]


def test_answers_are_those_of_the_ids_one_by_one(model):
    found = model.generate(PROMPTS, length=6, batch_size=2)
    for prompt, answer, row in zip(PROMPTS, found, ids(model, PROMPTS), strict=True):
        tokens, _ = decoding.generate(model.model, row[None], 6)
        assert answer == model.vocabulary.decode(tokens[0])
        assert model.generate(prompt, length=6) == answer


def test_beams_and_drawn_tokens(model):
    beams = Beams(2, 0.6)
    found = model.generate(PROMPTS[1:2], length=5, decoder=beams)
    tokens, _ = beam_search(model.model, ids(model, PROMPTS[1:2])[0][None], 5, beams=beams)
    assert found == [model.vocabulary.decode(tokens[0, 0])]
    drawn = [model.generate(PROMPTS, length=6, decoder=Sampling(), seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_stream_is_the_answer_in_pieces(model):
    for sampling in (Sampling(temperature=0.0), Sampling()):
        pieces = list(model.stream(PROMPTS[0], length=6, sampling=sampling, seed=3))
        whole = model.generate(PROMPTS[0], length=6, decoder=sampling, seed=3)
        assert "".join(pieces) == whole
        assert 1 < len(pieces) <= 6


def test_gaps_are_filled_in_brackets(model):
    filled = model.fill(PROMPTS[2], length=6)
    assert filled.startswith("Return [") and filled.endswith("] as they are.")
    assert filled.count("[") == 2


def test_scores_are_those_of_whole_rows(model):
    targets = ["<extra_id_0> length", "", "<extra_id_0> a <extra_id_1> b"]
    found = model.score(PROMPTS, targets, batch_size=2)
    for i, (prompt, target) in enumerate(
        zip(ids(model, PROMPTS), ids(model, targets), strict=True)
    ):
        alone = scoring.score(model.model, prompt[None], target[None])
        np.testing.assert_allclose(found[i], alone[0], atol=1e-4)
    with pytest.raises(ValueError, match="3 `inputs` and 1 `targets`"):
        model.score(PROMPTS, ["a"])


def test_a_checkpoint_with_its_vocabulary_needs_no_other(tmp_path, data_dir):
    store = tmp_path / "store"
    tiny_stores.write(store, Kind("qmoe"))
    with pytest.raises(ValueError, match=r"holds no sentencepiece\.model: give SENTENCEPIECE_M"):
        text_model.load(store)
    (store / vocabulary.FILE).write_bytes((data_dir / "text" / "sentencepiece.model").read_bytes())
    with pytest.raises(ValueError, match="the model's embedding has 11 rows"):
        text_model.load(store)  # the vocabulary was found
    with pytest.raises(ValueError, match="EXTRA_IDS is 10, but SENTENCEPIECE_MODEL_FILE is not"):
        text_model.load(store, extra_ids=10)
    with pytest.raises(ValueError, match="/nowhere"):
        text_model.load("/nowhere/checkpoint_1")


def test_what_cannot_be_asked_for(model):
    with pytest.raises(ValueError, match="BATCH_SIZE"):
        model.generate(PROMPTS, batch_size=-1)
    with pytest.raises(ValueError, match="`length` is 0"):
        model.generate(PROMPTS, length=0)
    with pytest.raises(ValueError, match="SEED is -1"):
        model.generate(PROMPTS, seed=-1)
    with pytest.raises(ValueError, match="surrogates"):
        model.generate(["\udc80"])
    with pytest.raises(ValueError, match="lists of texts"):
        model.score("ab", "cd")
    assert model.generate([]) == []


def test_what_a_machine_cannot_run(model):
    config = model.model.config
    for wanted in (0, 3, 1000):
        with pytest.raises(ValueError, match=f"PARTITIONS is {wanted}; expected one that divides"):
            text_model.check_machine(config, wanted, "auto", False)
    with pytest.raises(ValueError, match="IMPLEMENTATION is 'pallas', whose kernels need"):
        text_model.check_machine(config, 1, "pallas", False)


def test_experts_that_are_one_buffer_are_not_divided(model, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    with pytest.raises(ValueError, match="SIMULATE_DENSE has one buffer"):
        text_model.check_machine(model.model.config, 2, "auto", True)
