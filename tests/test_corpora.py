# SPDX-License-Identifier: Apache-2.0
"""Documents from files in every format, and what is said of files that are not well."""

import gzip
import json
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_jax.calibration import corpora

TEXTS = ["First document.", "Zweites – mit Umlaut ü.", "Third\nof two lines."]
JSON_LINES = "".join(json.dumps({"text": text, "url": "u"}) + "\n" for text in TEXTS)


def write(path, content, compress=False):
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if compress else raw)
    return str(path)


@pytest.mark.parametrize(
    "name", ["c4.json", "c4.jsonl", "c4-00000-of-01024.json.gz", "c4.jsonl.gz"]
)
def test_json_lines(tmp_path, name):
    path = write(tmp_path / name, JSON_LINES, name.endswith(".gz"))
    assert list(corpora.documents(path)) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_text_has_a_document_a_line(tmp_path, name, newline):
    content = newline.join(["", "one", "  ", " two ü ", "three"])
    path = write(tmp_path / name, content, name.endswith(".gz"))
    assert list(corpora.documents(path)) == ["one", "two ü", "three"]


def test_byte_order_mark_and_blank_lines_in_json(tmp_path):
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + b'{"text": "a"}\n\n{"text": ""}\n')
    assert list(corpora.documents(path)) == ["a", ""]


def test_another_field(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"content": "a"}\n')
    assert list(corpora.documents(path, text_field="content")) == ["a"]


def test_folders_globs_and_lists_are_sorted_and_read_once(tmp_path):
    for name in ("b.txt", "a.txt", "c.txt"):
        write(tmp_path / name, name)
    write(tmp_path / "LICENSE", "no document")
    expected = ["a.txt", "b.txt", "c.txt"]
    assert list(corpora.documents(str(tmp_path))) == expected
    assert list(corpora.documents(str(tmp_path / "*.txt"))) == expected
    assert list(corpora.documents(str(tmp_path / "[bc].txt"))) == expected[1:]
    assert list(corpora.documents([str(tmp_path / "c.txt"), str(tmp_path)])) == [
        "c.txt",
        "a.txt",
        "b.txt",
    ]


def test_double_star_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not supported"):
        next(corpora.documents(str(tmp_path / "**" / "*.txt")))


def test_glob_over_folders(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.txt", folder)
    assert list(corpora.documents(str(tmp_path / "*" / "a.txt"))) == ["x", "y"]


def test_name_with_wildcards_that_exists(tmp_path):
    assert list(corpora.documents(write(tmp_path / "a[1].txt", "text"))) == ["text"]


@pytest.mark.parametrize("name", ["absent.txt", "*.json", "."])
def test_nothing_matches(tmp_path, name):
    write(tmp_path / "README.md", "no document")
    with pytest.raises(ValueError, match=r"no text file matches .*: give a file, a folder"):
        next(corpora.documents(str(tmp_path / name)))


@pytest.mark.parametrize("paths", ["", [], ["a.txt", ""]])
def test_no_name(paths):
    with pytest.raises(ValueError, match="no text is named: `paths` is"):
        next(corpora.documents(paths))


def test_a_missing_file_is_told_before_the_first_document(tmp_path):
    present = write(tmp_path / "a.txt", "text")
    with pytest.raises(ValueError, match="no text file matches"):
        next(corpora.documents([present, str(tmp_path / "absent.txt")]))


@pytest.mark.parametrize("name", ["a.parquet", "a.gz", "a"])
def test_unknown_format(tmp_path, name):
    with pytest.raises(ValueError, match=f"cannot tell the format of .*{name}: its name must end"):
        next(corpora.documents(write(tmp_path / name, "text")))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"line 2 is not JSON .*: one object a line is expected"),
        (b"[", "line 2 is not JSON"),
        (b'{"url": "u", "id": 3}', r"line 2 has no string field 'text' \(it has fields \['id'"),
        (b'{"text": 3}', "line 2 has no string field 'text'"),
        (b'["text"]', r"line 2 has no string field 'text' \(it has list\)"),
        (b'{"text": "caf\xe9"}', "line 2 is not UTF-8"),
        (b'{"text": "\\ud800"}', "line 2 holds text that is not Unicode"),
    ],
)
def test_bad_line(tmp_path, line, message):
    read = corpora.documents(write(tmp_path / "a.jsonl", b'{"text": "good"}\n' + line + b"\n"))
    assert next(read) == "good"
    with pytest.raises(ValueError, match=rf"a\.jsonl, {message}"):
        next(read)


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-12]],
    ids=["no gzip", "cut short"],
)
def test_damaged_gzip(tmp_path, content):
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz is not a whole gzip file"):
        list(corpora.documents(write(tmp_path / "a.jsonl.gz", content)))


@settings(deadline=None)
@given(texts=st.lists(st.text(max_size=4), max_size=40), buffer_size=st.integers(1, 50))
def test_shuffling_loses_nothing_and_can_be_repeated(texts, buffer_size):
    def order():
        return list(corpora.shuffled(texts, np.random.default_rng(3), buffer_size))

    assert sorted(order()) == sorted(texts)
    assert order() == order()


def test_shuffling_moves_documents_and_streams():
    endless = (str(i) for i in iter(int, 1))
    assert next(corpora.shuffled(endless, np.random.default_rng(0), 8)) == "0"
    texts = [str(i) for i in range(100)]
    assert list(corpora.shuffled(texts, np.random.default_rng(0), 10)) != texts


class Source:
    """Stands for a SeqIO data source: yields `examples` as SeqIO's NumPy iterators do."""

    splits = ("train",)

    def __init__(self, examples):
        self.examples = examples

    def get_dataset(self, split, shuffle):
        assert (split, shuffle) == ("train", False)
        return self

    def as_numpy_iterator(self):
        return iter(self.examples)


@pytest.fixture
def register(monkeypatch):
    """Puts a module with SeqIO's registry interface in the place of SeqIO."""

    def register_tasks(**examples):
        def get(name):
            if name not in examples:
                raise ValueError(f"Provider name not registered: {name}")
            return types.SimpleNamespace(source=Source(examples[name]))

        registry = types.SimpleNamespace(get=get)
        monkeypatch.setitem(sys.modules, "seqio", types.SimpleNamespace(TaskRegistry=registry))

    return register_tasks


def test_seqio_examples_and_bare_lines(register, tmp_path):
    register(c4=[{"text": "ä".encode(), "url": b"u"}], lines=[b"one", b"two"])
    file = write(tmp_path / "a.txt", "file")
    assert list(corpora.seqio_documents("c4")) == ["ä"]
    assert list(corpora.documents(["task:c4", "task:lines", file])) == ["file", "ä", "one", "two"]


def test_seqio_errors(register):
    register(c4=[{"targets": b"a", "inputs": b"b"}])
    with pytest.raises(ValueError, match="SeqIO knows no task 'c5': import the module"):
        next(corpora.seqio_documents("c5"))
    with pytest.raises(ValueError, match="'c4' has no split 'test': it has"):
        next(corpora.seqio_documents("c4", split="test"))
    with pytest.raises(ValueError, match=r"no field 'text' \(it has \['inputs', 'targets'\]\)"):
        next(corpora.seqio_documents("c4"))


def test_seqio_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "seqio", None)
    with pytest.raises(ValueError, match="needs SeqIO: `pip install seqio`, or give files"):
        next(corpora.documents("task:c4_v220_span_corruption"))
