# SPDX-License-Identifier: Apache-2.0
"""Answers to files of prompts, in files as T5X's infer writes them; what is done survives a crash.

    {file}-{mode}.jsonl-00000-of-00001                        when all files are answered
    {file}-{mode}.jsonl-00000-of-00001.{settings}.chunk00000  until then, so many batches each

A chunk begins with the fingerprint of its prompts; its name holds that of the settings.
"""

import dataclasses
import glob
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Int32

from qmoe_jax.checkpoints import array_files
from qmoe_jax.inference import prompts as prompt_files
from qmoe_jax.inference import scoring, text_model
from qmoe_jax.inference.prompts import Prompt
from qmoe_jax.inference.text_model import Decoder, TextModel
from qmoe_jax.runs import progress
from qmoe_jax.runs.progress import Progress

Mode = Literal["predict", "predict_with_aux", "score"]
MODEL_PHASE = "model"  # what is timed


@dataclasses.dataclass(frozen=True)
class Task:
    """One file of prompts, as ids, and where its answers go."""

    name: str
    prompts: list[Prompt]
    columns: list[list[Int32[np.ndarray, " _"]]]  # inputs; of scores, targets too
    path: pathlib.Path | None  # None: standard output


@dataclasses.dataclass(frozen=True)
class How:
    """What is asked for, and in which portions."""

    mode: Mode
    length: int  # tokens of an answer, at most
    decoder: Decoder
    seed: int
    batch_size: int
    checkpoint_period: int  # batches after which answers are on disk
    made_with: str  # a fingerprint of all that decides the answers


def run(model: TextModel, tasks: Sequence[Task], how: How, shown: Progress) -> int:
    """Answers all tasks; returns how many tokens it took.

    Parts of an earlier run with the same settings and prompts are taken as they are.

    Raises:
      CheckpointError: the disk is full or cannot be written.
    """
    total = sum(_answer(model, task, how, shown) for task in tasks)
    for task in tasks:
        if task.path is not None:
            _merge(task.path, [_part(task.path, how, i) for i, _ in _chunks(task, how)])
    for task in tasks:  # none before all files are there: a part saves work until then
        if task.path is not None:
            for part in task.path.parent.glob(f"{glob.escape(task.path.name)}.*.chunk*"):
                part.unlink()
    return total


def _chunks(task: Task, how: How) -> Iterator[tuple[int, slice]]:
    size = how.batch_size * how.checkpoint_period
    for number, first in enumerate(range(0, len(task.prompts), size)):
        yield number, slice(first, min(first + size, len(task.prompts)))


def _part(path: pathlib.Path, how: How, number: int) -> pathlib.Path:
    return path.with_name(f"{path.name}.{how.made_with}.chunk{number:05}")


def _answer(model: TextModel, task: Task, how: How, shown: Progress) -> int:
    total = 0
    for number, rows in _chunks(task, how):
        part = None if task.path is None else _part(task.path, how, number)
        asked = hashlib.sha256(repr(task.prompts[rows]).encode()).hexdigest()
        if part is not None and _done(part, asked):
            progress.advance(shown, float(rows.stop - rows.start), task.name, 0, 0.0)
            continue
        columns = [column[rows] for column in task.columns]
        found, tokens = _answers(model, columns, how, number, task.name, shown)
        total += tokens
        pairs = zip(task.prompts[rows], found, strict=True)
        lines = "".join(_line(prompt, result) for prompt, result in pairs)
        if part is None:
            sys.stdout.write(lines)
            sys.stdout.flush()
        else:
            array_files.write_text(part, f"{asked}\n{lines}")
        progress.line(shown, f"{task.name}: {rows.stop:,} answers")
    return total


def _merge(path: pathlib.Path, parts: Sequence[pathlib.Path]) -> None:
    with array_files.replacing(path) as merged:
        for part in parts:
            merged.write(part.read_bytes().partition(b"\n")[2])


def _done(part: pathlib.Path, asked: str) -> bool:
    """Whether a part of an earlier run answers the same prompts."""
    if not part.exists():
        return False
    with part.open() as file:
        return file.readline().strip() == asked


def _answers(
    model: TextModel,
    columns: Sequence[Sequence[Int32[np.ndarray, " _"]]],
    how: How,
    chunk: int,
    name: str,
    shown: Progress,
) -> tuple[list[dict[str, Any]], int]:
    """What is written of each prompt, and how many tokens were made or scored."""
    results: list[dict[str, Any]] = [{} for _ in columns[0]]
    total, begun = 0, time.perf_counter()
    with progress.timed(shown, MODEL_PHASE):
        for rows, found, tokens in _batches(model, columns, how, chunk):
            for row, result in zip(rows, found, strict=True):
                results[row] = result
            spent, begun = time.perf_counter() - begun, time.perf_counter()
            progress.advance(shown, float(len(rows)), name, tokens, spent)
            total += tokens
    return results, total


def _batches(
    model: TextModel, columns: Sequence[Sequence[Int32[np.ndarray, " _"]]], how: How, chunk: int
) -> Iterator[tuple[list[int], list[dict[str, Any]], int]]:
    """Rows, their results, and how many tokens were made or scored."""
    if how.mode == "score":
        for rows, ids in prompt_files.batches(columns, how.batch_size):
            scores = scoring.score(model.model, *ids)[: len(rows)]
            tokens = sum(columns[1][row].size for row in rows)
            yield rows, [{"score": float(score)} for score in scores], tokens
        return
    for part in text_model.answer(
        model,
        columns[0],
        length=how.length,
        decoder=how.decoder,
        key=jax.random.fold_in(jax.random.key(how.seed), chunk),
        batch_size=how.batch_size,
    ):
        results = []
        for tokens, log_prob in zip(part.tokens, part.log_prob, strict=True):
            result: dict[str, Any] = {"prediction": model.vocabulary.decode(tokens)}
            if how.mode == "predict_with_aux":
                result["aux"] = {"scores": float(log_prob)}
            results.append(result)
        yield part.rows, results, int(np.count_nonzero(part.tokens))


def _line(prompt: Prompt, result: dict[str, Any]) -> str:
    inputs = {"inputs_pretokenized": prompt.inputs}
    if prompt.targets is not None:
        inputs["targets_pretokenized"] = prompt.targets
    return json.dumps({"inputs": inputs, **result}) + "\n"
