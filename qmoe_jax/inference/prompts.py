# SPDX-License-Identifier: Apache-2.0
"""What a model is asked: prompts from files, as token ids, in batches of like length."""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath
from jaxtyping import Int32

from qmoe_jax.calibration import corpora, data
from qmoe_jax.calibration.tokenizer import Tokenizer

STANDARD_INPUT = "-"
LENGTH_STEP = 32  # batches are padded to a multiple of it: few shapes to compile for


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One line of a file; the names are those of SeqIO's features."""

    inputs: str
    targets: str | None = None  # for scores; JSON alone has them


def files(names: Sequence[str] | str) -> list[str]:
    """The files that names, folders and globs stand for; `-`, standard input, stays.

    Raises:
      ValueError: nothing matches, or a file's suffix is not one that `read` knows.
    """
    names = [names] if isinstance(names, str) else names
    if any(name.startswith(corpora.SEQIO_PREFIX) for name in names):
        raise ValueError(
            f"PROMPTS is {list(names)}: tasks of SeqIO are not read, write their examples as JSON "
            "lines with `inputs` and `targets`"
        )
    return [
        str(file)
        for name in names
        for file in ([name] if name == STANDARD_INPUT else corpora.find_files(name))
    ]


def read(path: str) -> list[Prompt]:
    """The prompts of one file, in order.

    A `.txt` file holds one prompt a line; a `.json` or `.jsonl` file one object a line,
    `{"inputs": ..., "targets": ...}`, of which the second may be missing; a further `.gz` means
    gzip. `-` is standard input: lines of text. Blank lines are passed over.

    Raises:
      ValueError: damaged, or without any prompt; names the file and line.
    """
    if path == STANDARD_INPUT:
        lines = corpora.decoded(sys.stdin.buffer, "standard input")
        found = [Prompt(line) for line, _ in lines]
    else:
        file = epath.Path(path)
        json_lines = corpora.is_json(file)
        found = [
            _from_json(line, where) if json_lines else Prompt(line)
            for line, where in corpora.lines(file)
        ]
    if not found:
        raise ValueError(f"{path} holds no prompt; expected one a line")
    return found


def _from_json(line: str, where: str) -> Prompt:
    remedy = "expected `inputs` and, for scores, `targets`."
    inputs = corpora.text_field(line, "inputs", where, remedy=remedy)
    targets = corpora.text_field(line, "targets", where, required=False, remedy=remedy)
    assert inputs is not None
    return Prompt(inputs, targets)


def name(path: str) -> str:
    """What outputs are called: the file's name without its suffixes."""
    if path == STANDARD_INPUT:
        return "stdin"
    stem = pathlib.PurePosixPath(path).name.removesuffix(".gz")
    return stem.rpartition(".")[0] or stem


def encode(
    texts: Sequence[str], vocabulary: Tokenizer, max_length: int | None = None
) -> tuple[list[Int32[np.ndarray, " _"]], int]:
    """Ids with EOS at the end, as T5X's tasks give them, and how many texts had to be cut.

    Args:
      texts: `<extra_id_0>` in one stands for that sentinel.
      vocabulary: the model's own.
      max_length: ids of one text, EOS included; longer ones lose their end. None: any.

    Raises:
      ValueError: a text that is not Unicode.
    """
    for text in texts:
        text.encode()  # half a surrogate pair: UnicodeEncodeError, which is a ValueError
    encoded = vocabulary.encode_batch(texts)
    eos = np.array([vocabulary.eos_id], np.int32)
    kept = None if max_length is None else max_length - 1
    cut = sum(ids.size > ids[:kept].size for ids in encoded)
    return [np.concatenate([ids[:kept], eos]) for ids in encoded], cut


def batches(
    columns: Sequence[Sequence[Int32[np.ndarray, " _"]]], batch_size: int
) -> Iterator[tuple[list[int], list[Int32[np.ndarray, "B L"]]]]:
    """Rows of like length together, so that little is padding.

    Args:
      columns: one or several lists of as many rows, such as inputs and targets.
      batch_size: rows at most. A batch is filled up to it, or to a power of two where there are not
        so many rows at all (few shapes to compile for), with a row of its own, which a caller
        leaves out.

    Yields:
      The numbers of the rows in a batch, and for each column its rows, padded with 0.

    Raises:
      ValueError: a batch of no rows.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` (BATCH_SIZE) is {batch_size}; expected 1 or more")
    order = sorted(range(len(columns[0])), key=lambda i: [rows[i].size for rows in columns])
    height = min(batch_size, 1 << max(0, len(order) - 1).bit_length())
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        filled = chosen + chosen[-1:] * (height - len(chosen))
        yield chosen, [_rectangle([rows[i] for i in filled]) for rows in columns]


def _rectangle(rows: Sequence[Int32[np.ndarray, " _"]]) -> Int32[np.ndarray, "B L"]:
    longest = max(row.size for row in rows)
    return data.padded(rows, len(rows), -(-longest // LENGTH_STEP) * LENGTH_STEP)
