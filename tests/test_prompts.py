# SPDX-License-Identifier: Apache-2.0
import gzip
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmoe_jax.calibration import tokenizer
from qmoe_jax.inference import prompts
from qmoe_jax.inference.prompts import Prompt


def test_files_of_every_kind(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one\n\n two <extra_id_0> \n")
    assert prompts.read(str(tmp_path / "a.txt")) == [Prompt("one"), Prompt("two <extra_id_0>")]
    lines = [{"inputs": "ä", "targets": "b"}, {"inputs": "c", "more": 1}]
    text = "\n".join(map(json.dumps, lines))
    for name, data in (("b.jsonl", text.encode()), ("c.json.gz", gzip.compress(text.encode()))):
        (tmp_path / name).write_bytes(data)
        assert prompts.read(str(tmp_path / name)) == [Prompt("ä", "b"), Prompt("c")]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"x\r\n\ny")))
    assert prompts.read("-") == [Prompt("x"), Prompt("y")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n", "a.txt holds no prompt"),
        ("a.csv", "x", "cannot tell the format"),
        ("a.jsonl", "{", r"a.jsonl, line 1 is not JSON"),
        ("a.jsonl", '{"text": "x"}', r"line 1 has no string field 'inputs' \(it has fields \['te"),
        ("a.jsonl", '{"inputs": "x", "targets": 3}', "line 1 has no string field 'targets'"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        for file in prompts.files(str(tmp_path / name)):
            prompts.read(file)


def test_folders_and_globs(tmp_path):
    for name in ("b.txt", "a.jsonl", "c.csv"):
        (tmp_path / name).write_text("x")
    expected = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")]
    assert prompts.files(str(tmp_path)) == expected
    assert prompts.files([str(tmp_path / "*.txt"), "-"]) == [expected[1], "-"]
    with pytest.raises(ValueError, match="no text file matches"):
        prompts.files(str(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match="cannot be read"):
        prompts.files("http://host/prompts.txt")


def test_standard_input_that_is_not_utf8(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"x\n\xff\n")))
    with pytest.raises(ValueError, match="standard input, line 2 is not UTF-8"):
        prompts.read("-")


def test_names_of_outputs():
    names = ["/data/a.b.txt", "x.jsonl.gz", "-", "gs://bucket/folder/q.json", "plain"]
    assert [prompts.name(name) for name in names] == ["a.b", "x", "stdin", "q", "plain"]


def test_ids_end_in_eos_and_long_texts_lose_their_end(data_dir):
    vocabulary = tokenizer.load_tokenizer(data_dir / "text" / "sentencepiece.model")
    whole = vocabulary.encode("the quick brown fox").tolist()
    found, cut = prompts.encode(["the quick brown fox", ""], vocabulary)
    assert [ids.tolist() for ids in found] == [[*whole, 1], [1]]
    assert cut == 0
    for length, expected in ((len(whole) + 1, 0), (len(whole), 1), (3, 1)):
        (ids,), cut = prompts.encode(["the quick brown fox"], vocabulary, length)
        assert ids.tolist() == [*whole[: length - 1], 1]
        assert cut == expected


@given(
    lengths=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 40)), min_size=1, max_size=9),
    batch_size=st.integers(1, 5),
)
def test_every_row_is_in_one_batch(lengths, batch_size):
    columns = [
        [np.full(pair[side], i + 1, np.int32) for i, pair in enumerate(lengths)] for side in (0, 1)
    ]
    seen = []
    for rows, ids in prompts.batches(columns, batch_size):
        seen += rows
        for array, column in zip(ids, columns, strict=True):
            height = array.shape[0]
            assert height == batch_size or height.bit_count() == 1  # few shapes
            assert len(rows) <= height <= batch_size
            assert array.shape[1] % prompts.LENGTH_STEP == 0
            for row, number in zip(array, [*rows, *rows[-1:] * batch_size], strict=False):
                assert row[row > 0].tolist() == column[number].tolist()
    assert sorted(seen) == list(range(len(lengths)))
