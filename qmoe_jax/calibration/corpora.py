# SPDX-License-Identifier: Apache-2.0
"""Documents from text files, JSON lines (as C4 ships) and SeqIO tasks, streamed."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, cast

import numpy as np
from etils import epath

from qmoe_jax.calibration import addresses

JSON_SUFFIXES = (".json", ".jsonl")
SUFFIXES = (".txt", *JSON_SUFFIXES)
SEQIO_PREFIX = "task:"


def documents(paths: Sequence[str] | str, text_field: str = "text") -> Iterator[str]:
    """Yields the documents of files, folders and globs, then those of SeqIO tasks.

    A `.txt` file holds one document a line (as SeqIO's TextLineDataSource reads it), a `.json` or
    `.jsonl` file one JSON object a line; a further `.gz` means gzip. Blank lines are passed over. A
    folder gives its files with these suffixes, a glob what it matches, both sorted by name; a file
    met twice is read once. `task:NAME` gives the train split of a SeqIO task. Addresses are those
    of `etils.epath`, so that `gs://` works where its client is installed.

    Args:
        paths: one or several of the above.
        text_field: the field of a JSON object that holds the text.

    Raises:
        ValueError: nothing matches (before the first document), a file has another suffix, is
            damaged or not UTF-8, or a line is no JSON object with a string `text_field`; names the
            file and line.
    """
    names = [paths] if isinstance(paths, str) else list(paths)
    if not names or not all(names):
        raise ValueError(f"no text is named: `paths` is {paths!r}; give files, folders or globs.")
    tasks = [name for name in names if name.startswith(SEQIO_PREFIX)]
    files = [file for name in names if name not in tasks for file in find_files(name)]
    for file in dict.fromkeys(files):
        yield from _read_file(file, text_field)
    for task in tasks:
        yield from seqio_documents(task.removeprefix(SEQIO_PREFIX), text_field=text_field)


def find_files(name: str) -> list[epath.Path]:
    """Returns the text files that a file name, a folder or a glob stands for, sorted.

    Raises:
        ValueError: there are none, or a file's suffix is not one of `.txt`, `.json`, `.jsonl`, each
            also with `.gz`.
    """
    path = addresses.path(name)
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if _suffix(file) in SUFFIXES)
    elif path.exists():
        found = [path]
    else:
        found = sorted(_glob(path))
    if not found:
        raise ValueError(
            f"no text file matches {name!r}: give a file, a folder or a glob of .txt, .json or "
            ".jsonl files (with or without .gz), or task:NAME for a SeqIO task."
        )
    for file in found:
        if _suffix(file) not in SUFFIXES:
            raise ValueError(
                f"cannot tell the format of {file}: its name must end in .txt, .json or .jsonl, "
                "with or without .gz."
            )
    return found


def _glob(path: epath.Path) -> Iterator[epath.Path]:
    """Matches the parts from the first wildcard on against the folder before it."""
    wild = next((i for i, part in enumerate(path.parts) if set(part) & set("*?[")), None)
    if wild is None:
        return iter(())
    if "**" in path.parts:
        raise ValueError(f"{path} holds `**`, which is not supported: give the folders one by one.")
    return epath.Path(*path.parts[:wild]).glob("/".join(path.parts[wild:]))


def _suffix(path: epath.Path) -> str:
    """Returns the last suffix below `.gz`: `.json` for `c4-train.00000-of-01024.json.gz`."""
    return epath.Path(path.name.removesuffix(".gz")).suffix


def lines(path: epath.Path) -> Iterator[tuple[str, str]]:
    """Yields the lines of a text file that are not blank, each with where it stands.

    Raises:
        ValueError: a damaged file, or a line that is not UTF-8; names the file and line.
    """
    yield from decoded(_raw_lines(path), str(path))


def decoded(raw_lines: Iterable[bytes], source: str) -> Iterator[tuple[str, str]]:
    """`lines` of bytes that come from anywhere; errors name `source` and the line."""
    for number, raw_line in enumerate(raw_lines, start=1):
        where = f"{source}, line {number}"
        try:
            # Some editors begin a file with a byte order mark, which JSON does not allow.
            line = raw_line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not UTF-8 ({error}): convert the file.") from error
        if line:
            yield line, where


def is_json(path: epath.Path) -> bool:
    """Whether a file holds JSON lines, by its name."""
    return _suffix(path) in JSON_SUFFIXES


def text_field(
    line: str,
    name: str,
    where: str,
    *,
    required: bool = True,
    remedy: str = "name the field that holds the text.",
) -> str | None:
    """The text that field `name` of a line of JSON holds; None where it need not be there.

    Raises:
        ValueError: no JSON object, no such text, or none that is Unicode; names `where`.
    """
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where} is not JSON ({error}): one object a line is expected, as C4 ships."
        ) from error
    text = record.get(name) if isinstance(record, dict) else None
    if text is None and isinstance(record, dict) and not required:
        return None
    if not isinstance(text, str):
        has = f"fields {sorted(record)}" if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where} has no string field {name!r} (it has {has}): {remedy}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON's escapes can spell half a surrogate pair
        raise ValueError(f"{where} holds text that is not Unicode: {error}.") from error
    return text


def _read_file(path: epath.Path, field: str) -> Iterator[str]:
    json_lines = is_json(path)
    for line, where in lines(path):
        text = text_field(line, field, where) if json_lines else line
        assert text is not None
        yield text


def _raw_lines(path: epath.Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        stream = cast(IO[bytes], file)
        if path.suffix != ".gz":
            yield from stream
            return
        try:
            with gzip.GzipFile(fileobj=stream) as unzipped:
                yield from unzipped
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file: {error}.") from error


def seqio_documents(
    task_name: str, split: str = "train", text_field: str = "text"
) -> Iterator[str]:
    """Yields the raw texts of a SeqIO task's source, before its preprocessors.

    The task must have been registered: import the module that does so first.

    Raises:
        ValueError: SeqIO is not installed, the task is unknown or a mixture, has not the split, or
            its examples have no field `text_field`.
    """
    source = _seqio_source(task_name)
    if source.splits and split not in source.splits:
        raise ValueError(
            f"the SeqIO task {task_name!r} has no split {split!r}: it has {list(source.splits)}."
        )
    for example in source.get_dataset(split=split, shuffle=False).as_numpy_iterator():
        if isinstance(example, bytes):  # TextLineDataSource gives bare lines
            yield example.decode("utf-8")
        elif text_field in example:
            yield example[text_field].decode("utf-8")
        else:
            raise ValueError(
                f"the source of the SeqIO task {task_name!r} has no field {text_field!r} (it has "
                f"{sorted(example)}): name the field that holds the text."
            )


def _seqio_source(task_name: str) -> Any:
    try:
        # Not a dependency: it brings TensorFlow.
        import seqio  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"reading the SeqIO task {task_name!r} needs SeqIO: `pip install seqio`, or give files."
        ) from error
    try:
        return seqio.TaskRegistry.get(task_name).source
    except ValueError as error:
        raise ValueError(
            f"SeqIO knows no task {task_name!r}: import the module that registers it, and name a "
            "task, not a mixture."
        ) from error


def shuffled(texts: Iterable[str], rng: np.random.Generator, buffer_size: int) -> Iterator[str]:
    """Yields `texts` in random order, from a buffer of `buffer_size`: uniform if all fit in."""
    buffer: list[str] = []
    for text in texts:
        if len(buffer) < buffer_size:
            buffer.append(text)
            continue
        slot = int(rng.integers(buffer_size))
        yield buffer[slot]
        buffer[slot] = text
    rng.shuffle(buffer)
    yield from buffer
