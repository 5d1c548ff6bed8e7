# SPDX-License-Identifier: Apache-2.0
"""The demo's text and tokenizer: small, disjoint, fitting, and made as the script says."""

import importlib.util
import itertools
import json
import pathlib
import subprocess
import sys

import pytest

from qmoe_jax.calibration import corpora, data, tokenizer

DEMO = pathlib.Path(__file__).parents[1] / "examples" / "demo"
TEXTS = ("train", "calibration", "heldout")


@pytest.fixture(scope="module")
def make_text():
    spec = importlib.util.spec_from_file_location("make_text", DEMO / "make_text.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(make_text, tmp_path_factory):
    """The files that the running Python makes."""
    folder = tmp_path_factory.mktemp("demo")
    make_text.main(folder)
    return folder


@pytest.fixture(params=["kept", "made"])
def folder(request):
    """The files in the repository (which has no `train.jsonl`), and those this Python makes."""
    return DEMO if request.param == "kept" else request.getfixturevalue("made")


def records(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]


def source(record):
    return record["id"].rpartition("/")[0]


def assert_disjoint(others, heldout):
    for field in ("id", "text"):
        values = [record[field] for record in others + heldout]
        assert len(set(values)) == len(values)
    assert not set(map(source, others)) & set(map(source, heldout))
    everything = " ".join(record["text"] for record in others)
    assert not any(record["text"] in everything for record in heldout)


def test_kept_files_are_small():
    size = {file.name: file.stat().st_size for file in DEMO.iterdir()}
    assert 0 < size["calibration.jsonl"] + size["heldout.jsonl"] <= 300_000
    assert 0 < size["sentencepiece.model"] <= 120_000


def test_heldout_text_is_not_in_the_calibration_text(folder):
    assert_disjoint(records(folder, "calibration"), records(folder, "heldout"))


@pytest.mark.parametrize("heldout", ["kept", "made"])
def test_heldout_text_is_not_in_the_training_text(made, heldout):
    """The kept one neither: train.gin trains on what is made and validates on what is kept."""
    folder = DEMO if heldout == "kept" else made
    assert_disjoint(records(made, "train"), records(folder, "heldout"))


def test_no_paragraph_is_in_two_documents(make_text, monkeypatch):
    monkeypatch.setattr(make_text, "merged", iter)  # a document each
    train, heldout = make_text.split_documents()
    assert len(train) > len(heldout) > 100
    paragraphs = [document["text"] for document in train + heldout]
    assert len(set(paragraphs)) == len(paragraphs)


def test_calibration_text_is_an_even_choice_of_the_training_text(made):
    train, calibration = records(made, "train"), records(made, "calibration")
    places = [train.index(record) for record in calibration]
    assert len({b - a for a, b in itertools.pairwise(places)}) == 1
    assert places[-1] > 0.99 * len(train) - 20
    assert sum(len(record["text"]) for record in train) > 1_500_000


def test_every_document_is_a_sample_and_every_id_has_a_row(folder):
    vocabulary = tokenizer.load_tokenizer(folder / "sentencepiece.model")
    assert (vocabulary.vocab_size, vocabulary.num_sentinels) == (4096, 32)
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
    for name in ("calibration", "heldout"):
        texts = list(corpora.documents(str(folder / f"{name}.jsonl")))
        tokens = [len(ids) for ids in vocabulary.encode_batch(texts)]
        assert 40 < min(tokens) <= max(tokens) <= 500
        samples = data.make_samples(texts, vocabulary, len(texts), seed=0)
        assert samples.counts.too_long == samples.counts.too_short == 0
        assert samples.encoder_input_tokens.max() < 4096
        assert vocabulary.decode(vocabulary.encode(texts[0])) == texts[0]


def test_another_process_makes_the_same_files_and_counts_them(made, tmp_path):
    command = [sys.executable, str(DEMO / "make_text.py"), str(tmp_path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for name in [*(f"{text}.jsonl" for text in TEXTS), "sentencepiece.model"]:
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes()
    for name in TEXTS:
        documents = records(made, name)
        characters = sum(len(document["text"]) for document in documents)
        assert f"{name}.jsonl: {len(documents):,} documents, {characters:,} characters" in output


@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="another Python has other texts")
def test_the_script_makes_the_files_in_the_repository(make_text, made):
    """All but a few: a distribution may patch, or leave out, modules of that very Python."""
    train, heldout = make_text.split_documents()
    for name, documents in [("calibration", train), ("heldout", heldout)]:
        kept = records(DEMO, name)
        assert sum(record in documents for record in kept) >= 0.9 * len(kept)
    pieces, kept = (
        {processor.id_to_piece(i) for i in range(4096)}
        for processor in (
            tokenizer.load_tokenizer(place / "sentencepiece.model").processor
            for place in (made, DEMO)
        )
    )
    assert len(pieces & kept) >= 0.9 * 4096
