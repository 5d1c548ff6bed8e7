# SPDX-License-Identifier: Apache-2.0
"""SentencePiece vocabularies with T5's sentinels, in either of their two spellings.

Switch's own `cc_all.32000.100extra` holds its 100 sentinels as pieces; T5's `cc_all.32000` has
none, and SeqIO appends them (`extra_ids=100`). Both give ids 32000 to 32099.
"""

import dataclasses
import itertools
import struct
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import numpy as np
import sentencepiece
from etils import epath
from jaxtyping import Int32

from qmoe_jax.calibration import addresses

PAD_ID = 0  # of every T5 vocabulary, and the decoder's start


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A loaded vocabulary; its sentinels are its last `num_sentinels` ids."""

    processor: sentencepiece.SentencePieceProcessor
    vocab_size: int  # sentinels included; the model's embedding may have more rows
    num_sentinels: int
    eos_id: int
    unk_id: int
    pad_id: int = PAD_ID

    @property
    def first_sentinel_id(self) -> int:
        """The highest id, `<extra_id_0>` in T5's files: T5 numbers spans downwards from it."""
        return self.vocab_size - 1

    @property
    def lowest_sentinel_id(self) -> int:
        """Ids from here on are sentinels."""
        return self.vocab_size - self.num_sentinels

    @property
    def model(self) -> bytes:
        """A SentencePiece model file with these ids, sentinels included."""
        return self.processor.serialized_model_proto()

    def encode(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """Returns the ids of `text`, without EOS. `<extra_id_0>` in it becomes that sentinel."""
        return np.asarray(self.processor.encode(text), np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " _"]]:
        """Returns `encode` of each text, on all cores."""
        return [np.asarray(ids, np.int32) for ids in self.processor.encode(list(texts))]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Returns the text up to the first EOS; sentinels show as `<extra_id_0>`, pads not at all.

        Ids beyond the vocabulary (rows that only pad the embedding) read as the unknown token.
        """
        spoken = itertools.takewhile(lambda i: i != self.eos_id, map(int, ids))
        return self.processor.decode([i if i < self.vocab_size else self.unk_id for i in spoken])


def load_tokenizer(path: epath.PathLike | None, extra_ids: int | None = None) -> Tokenizer:
    """Loads a SentencePiece model file.

    Args:
        path: the `.model` file; local, or any address that `etils.epath` reads. None is refused.
        extra_ids: sentinels to append to a model that holds none; None or 0 for a model that does.

    Raises:
        ValueError: no such file, no SentencePiece model, no sentinels (or sentinels twice, or not
            at the end), no EOS, or an id 0 that is not reserved for padding.
    """
    if path is None:
        raise ValueError("SENTENCEPIECE_MODEL_FILE is not set; expected the model's own vocabulary")
    path = addresses.path(path)
    model = _read(path)
    processor = _processor(model, path)
    sentinels = _sentinel_ids(processor)
    if extra_ids:
        if sentinels:
            raise ValueError(
                f"the tokenizer {path} already holds {len(sentinels)} sentinels: leave out "
                f"`extra_ids`, which is {extra_ids}."
            )
        processor = _processor(with_sentinels(model, extra_ids), path)
        sentinels = _sentinel_ids(processor)
    _check_sentinels(sentinels, processor.get_piece_size(), path)
    _check_special_ids(processor, path)
    return Tokenizer(
        processor=processor,
        vocab_size=processor.get_piece_size(),
        num_sentinels=len(sentinels),
        eos_id=processor.eos_id(),
        unk_id=processor.unk_id(),
    )


def _read(path: epath.Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"there is no tokenizer file {path}.")
    return path.read_bytes()


def check_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Checks that each id has a row in an embedding of `vocab_size` rows.

    Raises:
        ValueError: it has not.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids (sentinels included), but the model's "
            f"embedding has {vocab_size} rows: use the tokenizer the checkpoint was trained with."
        )


def with_sentinels(model: bytes, extra_ids: int) -> bytes:
    """Returns a serialized SentencePiece model with `extra_ids` sentinel pieces at its end.

    The last piece is `<extra_id_0>`. A protocol buffer's repeated field may be continued anywhere,
    so that appending the pieces' bytes is enough (SeqIO: vocabularies.py, which parses the model).

    Raises:
        ValueError: `extra_ids` is negative.
    """
    if extra_ids < 0:
        raise ValueError(f"`extra_ids` must not be negative, but is {extra_ids}.")
    return model + b"".join(_user_piece(f"▁<extra_id_{i}>") for i in reversed(range(extra_ids)))


def _user_piece(name: str) -> bytes:
    """Encodes field 1 of ModelProto: piece (1) `name`, score (2) 0.0, type (3) USER_DEFINED = 4."""
    text = name.encode()
    body = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", 0.0) + b"\x18\x04"
    return b"\x0a" + bytes([len(body)]) + body


def _processor(model: bytes, path: epath.Path) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(model)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a SentencePiece model: {error}") from error
    if not processor.get_piece_size():
        raise ValueError(f"{path} is not a SentencePiece model: it is empty.")
    return processor


def _sentinel_ids(processor: sentencepiece.SentencePieceProcessor) -> list[int]:
    """Returns the ids of `<extra_id_0>`, `<extra_id_1>`, ... as far as they go."""
    id_of_piece = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    names = (f"<extra_id_{number}>" for number in itertools.count())
    ids = (id_of_piece.get(f"▁{name}", id_of_piece.get(name, -1)) for name in names)
    return list(itertools.takewhile(lambda sentinel: sentinel >= 0, ids))


def _check_sentinels(sentinels: Sequence[int], vocab_size: int, path: epath.Path) -> None:
    """Checks that there are sentinels, and that they are the last ids, in whatever order."""
    if not sentinels:
        raise ValueError(
            f"the tokenizer {path} holds no `<extra_id_0>`: pass `extra_ids` (100 for T5's "
            "cc_all.32000) to append the sentinels that span corruption needs."
        )
    if sorted(sentinels) != list(range(vocab_size - len(sentinels), vocab_size)):
        raise ValueError(
            f"the tokenizer {path} has {len(sentinels)} sentinels with ids {min(sentinels)} to "
            f"{max(sentinels)}, but T5 wants them to be the last of its {vocab_size} ids."
        )


def _check_special_ids(processor: sentencepiece.SentencePieceProcessor, path: epath.Path) -> None:
    """Checks T5's conventions: 0 pads, and there is an EOS."""
    if not processor.is_control(PAD_ID):
        raise ValueError(
            f"id 0 of the tokenizer {path} is {processor.id_to_piece(PAD_ID)!r}, but T5 pads with "
            "0: train it with `pad_id=0`."
        )
    if processor.eos_id() < 0:
        raise ValueError(f"the tokenizer {path} has no EOS token: train it with `eos_id=1`.")
