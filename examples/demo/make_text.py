# SPDX-License-Identifier: Apache-2.0
"""Makes the demo's calibration text, held-out text and tokenizer from Python's own help texts.

    python examples/demo/make_text.py FOLDER

The files beside this script were made by Python 3.11.7 with sentencepiece 0.2.3; another Python has
other help texts. They are kept so that every demo reads the same text. The text is Python's
documentation, under the licence in PYTHON-LICENSE.txt.
"""

import io
import json
import pathlib
import pydoc_data.topics
import re
import sys
from collections.abc import Iterator
from typing import Any

import sentencepiece

from qmoe_jax.calibration import tokenizer

PIECES, SENTINELS = 480, 32  # together the 512 rows of the demo model's embedding
MIN_CHARACTERS, MAX_CHARACTERS = 250, 1200  # of a document: at most 568 tokens, so that all fit
HELD_OUT_EVERY = 6  # topics
ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})

Document = dict[str, str]


def main(folder: pathlib.Path) -> None:
    """Writes `calibration.jsonl`, `heldout.jsonl` and `sentencepiece.model` into `folder`."""
    calibration, heldout = split_documents()
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents in [("calibration", calibration), ("heldout", heldout)]:
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    model = train_tokenizer([document["text"] for document in calibration])
    (folder / "sentencepiece.model").write_bytes(model)


def split_documents() -> tuple[list[Document], list[Document]]:
    """Returns calibration and held-out documents: no topic and no paragraph is in both."""
    seen: set[str] = set()  # topics repeat one another's paragraphs
    calibration: list[Document] = []
    heldout: list[Document] = []
    for number, topic in enumerate(sorted(pydoc_data.topics.topics)):
        fresh = [text for text in paragraphs(topic) if text not in seen]
        seen.update(fresh)
        chosen = heldout if number % HELD_OUT_EVERY == 1 else calibration
        for part, text in enumerate(merged(fresh)):
            chosen.append({"id": f"{topic}/{part}", "text": text})
    return calibration, heldout


def paragraphs(topic: str) -> Iterator[str]:
    """Yields the prose of a help topic, a paragraph each; no code, grammar, table or heading."""
    for block in re.split(r"\n\s*\n", pydoc_data.topics.topics[topic]):
        text = " ".join(block.split()).translate(ASCII)
        is_prose = not block.startswith(" ") and not re.search(r"::=|\*\*\*|===|---|-\[", block)
        if is_prose and text.isascii() and len(text) >= 40:
            yield text


def merged(texts: list[str]) -> Iterator[str]:
    """Joins neighbours until they are long enough for a document; drops what is too long."""
    document = ""
    for text in texts:
        document = f"{document} {text}".strip()
        if len(document) >= MIN_CHARACTERS:
            if len(document) <= MAX_CHARACTERS:
                yield document
            document = ""


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
