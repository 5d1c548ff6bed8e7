# SPDX-License-Identifier: Apache-2.0
"""The demo's text and tokenizer: small, disjoint, fitting, and made as the script says."""

import importlib.util
import json
import pathlib
import platform

import pytest
import sentencepiece

from qmoe_jax.calibration import corpora, data, tokenizer

DEMO = pathlib.Path(__file__).parents[1] / "examples" / "demo"


@pytest.fixture(scope="module", params=["kept", "made"])
def folder(request, tmp_path_factory):
    """The files in the repository, and those that the running Python makes."""
    if request.param == "kept":
        return DEMO
    spec = importlib.util.spec_from_file_location("make_text", DEMO / "make_text.py")
    assert spec is not None
    assert spec.loader is not None
    make_text = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_text)
    made = tmp_path_factory.mktemp("demo")
    make_text.main(made)
    return made


def records(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]


def test_files_are_small():
    limits = {"calibration.jsonl": 200_000, "heldout.jsonl": 40_000, "sentencepiece.model": 300_000}
    for name, limit in limits.items():
        assert 0 < (DEMO / name).stat().st_size <= limit


def test_heldout_text_is_not_in_the_calibration_text(folder):
    calibration, heldout = records(folder, "calibration"), records(folder, "heldout")
    for field in ("id", "text"):
        values = [record[field] for record in calibration + heldout]
        assert len(set(values)) == len(values)
    topics = [{record["id"].split("/")[0] for record in side} for side in (calibration, heldout)]
    assert not topics[0] & topics[1]
    everything = " ".join(record["text"] for record in calibration)
    assert not any(record["text"] in everything for record in heldout)


def test_every_document_is_a_sample_and_every_id_has_a_row():
    vocabulary = tokenizer.load_tokenizer(DEMO / "sentencepiece.model")
    assert vocabulary.vocab_size == 512
    assert vocabulary.num_sentinels == 32
    for name in ("calibration", "heldout"):
        texts = list(corpora.documents(str(DEMO / f"{name}.jsonl")))
        samples = data.make_samples(texts, vocabulary, len(texts), seed=0)
        assert samples.counts.too_long == samples.counts.too_short == 0
        assert samples.encoder_input_tokens.max() < 512
        assert vocabulary.decode(vocabulary.encode(texts[0])) == texts[0]


@pytest.mark.parametrize("folder", ["made"], indirect=True)
@pytest.mark.parametrize("name", ["calibration.jsonl", "heldout.jsonl", "sentencepiece.model"])
def test_the_script_makes_the_files_in_the_repository(folder, name):
    if (platform.python_version(), sentencepiece.__version__) != ("3.11.7", "0.2.3"):
        pytest.skip("another Python or SentencePiece makes other files")
    assert (folder / name).read_bytes() == (DEMO / name).read_bytes()
