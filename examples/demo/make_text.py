# SPDX-License-Identifier: Apache-2.0
"""Makes the demo's text and tokenizer from the English that comes with every Python.

    python examples/demo/make_text.py FOLDER

That is the help topics of `pydoc`, and the docstrings and the comments of several lines in the
standard library: about 2 MB of prose. `heldout.jsonl` is some topics and modules, whole;
`train.jsonl` is all the others, and `calibration.jsonl` an even choice of its documents.

The files beside this script were made by Python 3.11.7 with sentencepiece 0.2.3; another Python has
other texts, but holds out the same names. They are kept so that every demo reads the same text.
`train.jsonl` is not kept: it takes one run of this script. The text is Python's, under the licence
in PYTHON-LICENSE.txt.
"""

import ast
import io
import itertools
import json
import pathlib
import pydoc_data.topics
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from typing import Any

import sentencepiece

from qmoe_jax.calibration import tokenizer

PIECES, SENTINELS = 4064, 32  # together the 4,096 rows of the demo model's embedding
MIN_CHARACTERS, MAX_CHARACTERS = 300, 1500  # of a document, so that its tokens fit 568
CALIBRATION_CHARACTERS, HELDOUT_CHARACTERS = 200_000, 65_000
NOT_PROSE = {"encodings", "pydoc_data", "site-packages", "dist-packages", "ensurepip"}
TESTS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo"}
HELD_OUT = {  # by name: another Python, with more modules or fewer, holds out the same
    *("topics/assignment", "topics/compound", "topics/specialattrs", "argparse", "asyncio/queues"),
    *("bz2", "contextlib", "dataclasses", "distutils/command/build_clib", "distutils/dep_util"),
    *("email/_encoded_words", "email/mime/message", "graphlib", "importlib/abc", "inspect"),
    *("multiprocessing/connection", "multiprocessing/synchronize", "posixpath", "secrets"),
    *("statistics", "turtle", "urllib/response", "xml/dom/__init__"),
}
ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})

Document = dict[str, str]


def main(folder: pathlib.Path) -> None:
    """Writes the three texts and `sentencepiece.model` into `folder`."""
    train, heldout = split_documents()
    texts = {
        "train": train,
        "calibration": spread(train, CALIBRATION_CHARACTERS),
        "heldout": spread(heldout, HELDOUT_CHARACTERS),
    }
    model = train_tokenizer([document["text"] for document in train])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sentencepiece.model").write_bytes(model)
    print(f"sentencepiece.model: {PIECES + SENTINELS:,} ids, {len(model):,} bytes")
    vocabulary = tokenizer.load_tokenizer(folder / "sentencepiece.model")
    for name, documents in texts.items():
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        characters = sum(len(document["text"]) for document in documents)
        tokens = sum(len(vocabulary.encode(document["text"])) for document in documents)
        print(
            f"{name}.jsonl: {len(documents):,} documents, {characters:,} characters, "
            f"{tokens:,} tokens"
        )


def split_documents() -> tuple[list[Document], list[Document]]:
    """Training and held-out documents: no source and no paragraph is in both."""
    seen: set[str] = set()  # sources repeat one another's paragraphs
    train: list[Document] = []
    heldout: list[Document] = []
    for name, blocks in itertools.chain(topics(), modules()):
        fresh = [text for text in dict.fromkeys(paragraphs(blocks)) if text not in seen]
        seen.update(fresh)
        side = heldout if name in HELD_OUT else train
        for part, text in enumerate(merged(fresh)):
            side.append({"id": f"{name}/{part}", "text": text})
    return train, heldout


def topics() -> Iterator[tuple[str, list[str]]]:
    """Each help topic of `pydoc` and its blocks."""
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        yield f"topics/{topic}", re.split(r"\n\s*\n", text)


def modules() -> Iterator[tuple[str, list[str]]]:
    """Each module of the standard library and the blocks of its docstrings and comments."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if not {*path.parts} & (NOT_PROSE | TESTS) and "config-" not in path.parts[0]:
            blocks = list(source_blocks(file.read_bytes()))
            if blocks:
                yield path.with_suffix("").as_posix(), blocks


def source_blocks(source: bytes) -> Iterator[str]:
    """Blocks of all docstrings in a module's source, then its comments of several lines."""
    try:
        text, tree = source.decode(), ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):
        return  # samples of broken code, old encodings
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from re.split(r"\n\s*\n", ast.get_docstring(node) or "")
    for comment in re.finditer(r"(?:^[ \t]*#.*\n){2,}", text, re.MULTILINE):
        lines = (line.strip().removeprefix("#").strip() for line in comment[0].splitlines())
        yield from re.split(r"\n\n+", "\n".join(lines))


def paragraphs(blocks: Iterable[str]) -> Iterator[str]:
    """The blocks of prose, a paragraph each; no code, grammar, table or heading."""
    for block in blocks:
        text = " ".join(block.split()).translate(ASCII)
        is_prose = not re.search(r"::=|\*\*\*|===|---|-\[|>>>|###|\|", block)
        if is_prose and text.isascii() and len(text) >= 40 and mostly_words(text):
            yield text


def mostly_words(text: str) -> bool:
    """Whether at least four fifths of the characters are letters and spaces: tables are not."""
    return sum(c.isalpha() or c == " " for c in text) >= 0.8 * len(text)


def merged(texts: list[str]) -> Iterator[str]:
    """Joins neighbours until they are long enough for a document; drops what is too long."""
    document = ""
    for text in texts:
        document = f"{document} {text}".strip()
        if len(document) >= MIN_CHARACTERS:
            if len(document) <= MAX_CHARACTERS:
                yield document
            document = ""


def spread(documents: list[Document], characters: int) -> list[Document]:
    """About every n-th document, so that they have at most so many characters."""
    step = -(-sum(len(document["text"]) for document in documents) // characters)
    return documents[:: max(1, step)]


def train_tokenizer(texts: list[str]) -> bytes:
    """Trains a vocabulary with T5's special ids and its sentinels as the last pieces."""
    settings: dict[str, Any] = {
        "vocab_size": PIECES,
        "character_coverage": 1.0,
        "normalization_rule_name": "identity",  # the default's table would add 240 KB
        "pad_id": 0,
        "eos_id": 1,
        "unk_id": 2,
        "bos_id": -1,
        "num_threads": 1,  # one order of sums, one model
        "minloglevel": 1,
    }
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=writer, **settings
    )
    return tokenizer.with_sentinels(writer.getvalue(), SENTINELS)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER")
    main(pathlib.Path(sys.argv[1]))
