# SPDX-License-Identifier: Apache-2.0
"""SentencePiece models trained on the standard library's help texts: nothing is downloaded."""

import functools
import io
import pydoc_data.topics
import struct

import sentencepiece

SENTENCES = tuple(
    line.strip()
    for name in sorted(pydoc_data.topics.topics)[:20]
    for line in pydoc_data.topics.topics[name].splitlines()
    if line.strip()
)[:600]


@functools.cache
def sentencepiece_model(pieces: int = 200, **options: int) -> bytes:
    """Trains a model with T5's special ids (0 pads, 1 ends, 2 unknown) and no sentinels."""
    options = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | options
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=writer,
        vocab_size=pieces,
        # The default rule would add its 240 KB table to the model.
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
        **options,  # pyright: ignore[reportArgumentType]
    )
    return writer.getvalue()


def with_pieces(model: bytes, names: list[str], score: float = 0.0, kind: int = 4) -> bytes:
    """Appends pieces to a serialized model; kind 1 is an ordinary one, 4 a user-defined one."""
    for name in names:
        piece = struct.pack("<BB", 0x0A, len(name.encode())) + name.encode()
        piece += struct.pack("<BfBB", 0x15, score, 0x18, kind)
        model += struct.pack("<BB", 0x0A, len(piece)) + piece
    return model
