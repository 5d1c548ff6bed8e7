# SPDX-License-Identifier: Apache-2.0
"""Runs a checkpoint, original or packed, on a user's prompts; writes what T5X's infer writes."""

import dataclasses
import glob
import hashlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
import rich.console
from jaxtyping import Int32

from pallas_kernels.implementation import Implementation
from qmoe_jax.calibration import tokenizer
from qmoe_jax.checkpoints import array_files, packed, source
from qmoe_jax.inference import prompts as prompt_files
from qmoe_jax.inference import scoring, text_model
from qmoe_jax.inference.beam_search import Beams
from qmoe_jax.inference.decoding import Sampling
from qmoe_jax.inference.prompts import Prompt
from qmoe_jax.inference.text_model import Decoder, TextModel
from qmoe_jax.models import config as configs
from qmoe_jax.models.config import SwitchConfig
from qmoe_jax.runs import progress
from qmoe_jax.runs.progress import Progress

LENGTHS: Mapping[str, int] = {"inputs": 512, "targets": text_model.LENGTH}
_MODEL = "model"  # the phase that is timed
Mode = Literal["predict", "predict_with_aux", "score"]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are found, by T5X's names.

    Attributes:
      num_decodes: beams; 1 takes or draws one token after another.
      alpha: of the beams' brevity penalty.
      temperature: 0 takes the likeliest token; above, tokens are drawn.
      topk: draw from the likeliest so many; 0: from all.
      topp: draw from the smallest set of likeliest tokens with this probability; 0: from all.
    """

    num_decodes: int = 1
    alpha: float = 0.6
    temperature: float = 0.0
    topk: int = 0
    topp: float = 0.0

    def decoder(self) -> Decoder:
        """Its form in the inference code.

        Raises:
          ValueError: settings that exclude each other.
        """
        if self.num_decodes == 1:
            if self.temperature == 0 and (self.topk or self.topp):
                raise ValueError("TOPK and TOPP are of drawn tokens: set TEMPERATURE, to 1.0 say")
            return Sampling(self.temperature, self.topk, self.topp)
        if self.temperature:
            raise ValueError(
                f"NUM_DECODES is {self.num_decodes} and TEMPERATURE {self.temperature}: beams are "
                "not drawn; leave one of them at its default"
            )
        return Beams(self.num_decodes, self.alpha)


@dataclasses.dataclass(frozen=True)
class Task:
    """One file of prompts, as ids, and where its answers go."""

    name: str
    prompts: list[Prompt]
    columns: list[list[Int32[np.ndarray, " _"]]]  # inputs; of scores, targets too
    path: pathlib.Path | None


def infer(
    checkpoint_path: str,
    prompts: Sequence[str] | str,
    *,
    mode: Mode = "predict",
    infer_output_dir: str | None = None,
    sentencepiece_model_file: str | None = None,
    extra_ids: int | None = None,
    task_feature_lengths: Mapping[str, int] = LENGTHS,
    decoding: Decoding = Decoding(),
    seed: int = 0,
    batch_size: int = 32,
    checkpoint_period: int = 16,
    activation_dtype: str | None = None,
    implementation: Implementation = "auto",
    num_expert_partitions: int = 1,
    simulate_dense: bool = False,
    dry_run: bool = False,
    console: rich.console.Console | None = None,
) -> None:
    """Writes `{file}-{mode}.jsonl-00000-of-00001` for each file of prompts, as T5X does for tasks.

    Its lines hold `inputs` (the prompt, and the target if there is one) and `prediction`, of mode
    "predict_with_aux" also `aux` with its score, or of mode "score" `score`: the natural logarithm
    of the target's probability. Lines come in the order of the prompts. What is done is kept, and a
    run that was stopped goes on from there.

    Args:
      checkpoint_path: a packed, T5X or Hugging Face checkpoint.
      prompts: files (see `inference.prompts.read`), folders or globs; `-` is standard input.
      mode: what to find.
      infer_output_dir: folder for the answers; None: the lines go to standard output.
      sentencepiece_model_file: of the model's vocabulary; None: the packed checkpoint's own.
      extra_ids: sentinels to add to a tokenizer that has none.
      task_feature_lengths: tokens of `inputs`, beyond which they are cut, and of `targets`, which
        is also how long answers may be; by default 512 and 114.
      decoding: how answers are found.
      seed: of tokens that are drawn.
      batch_size: prompts at a time.
      checkpoint_period: batches after which answers are written.
      activation_dtype: see `text_model.load`.
      implementation: of the products with packed experts.
      num_expert_partitions: devices that share the experts of each layer (T5X's name).
      simulate_dense: for timings alone: the experts of a layer become one dense buffer, as in the
        paper's comparison; answers mean nothing.
      dry_run: check the inputs and stop before any weight is read.
      console: where progress goes; None: standard output, or the error output if that is taken.

    Raises:
      ValueError: settings or prompts that cannot be, or a damaged checkpoint (CheckpointError).
    """
    console = console or rich.console.Console(stderr=infer_output_dir is None)
    decoder = decoding.decoder()
    lengths = dict(LENGTHS) | dict(task_feature_lengths)
    for name, number in (("BATCH_SIZE", batch_size), ("CHECKPOINT_PERIOD", checkpoint_period)):
        if number < 1:
            raise ValueError(f"{name} is {number}; expected 1 or more")
    if set(lengths) != {"inputs", "targets"} or min(lengths.values()) < 2:
        raise ValueError(
            f"TASK_FEATURE_LENGTHS is {lengths}; expected `inputs` and `targets` of 2 up"
        )
    text_model.check_devices(num_expert_partitions, implementation)
    checkpoint = source.open_source(checkpoint_path)
    vocabulary = text_model.load_vocabulary(checkpoint_path, sentencepiece_model_file, extra_ids)
    tokenizer.check_fits(vocabulary, checkpoint.config.vocab_size)
    output = None if infer_output_dir is None else array_files.local_folder(infer_output_dir)
    if output is not None and packed.is_packed(output):
        raise ValueError(f"INFER_OUTPUT_DIR {output} is a packed checkpoint: choose another folder")
    files = prompt_files.files(prompts)
    tasks = [_task(file, mode, vocabulary, lengths, output, console) for file in files]
    if len({task.name for task in tasks}) < len(tasks) or not tasks:
        raise ValueError(f"PROMPTS is {files}; expected one or more files with different names")
    if dry_run:
        console.print("dry run: inputs are sound, nothing was written")
        return
    model = text_model.load(
        checkpoint_path,
        sentencepiece_model_file=sentencepiece_model_file,
        extra_ids=extra_ids,
        activation_dtype=activation_dtype,
        implementation=implementation,
        num_expert_partitions=num_expert_partitions,
        simulate_dense=simulate_dense,
    )
    console.print(f"{checkpoint.path}: {model.model.nbytes:,} bytes in memory", soft_wrap=True)
    how = _How(mode, lengths["targets"], decoder, seed, batch_size, checkpoint_period)
    if output is not None:
        array_files.write_text(output / "model-info.txt", _model_info(checkpoint.config))
    made_with = _fingerprint(
        checkpoint.path, how, lengths, extra_ids, activation_dtype, simulate_dense
    )
    with progress.showing(float(sum(len(task.prompts) for task in tasks)), console) as shown:
        tokens = sum(_run_task(model, task, how, made_with, shown) for task in tasks)
    for task in tasks:
        if task.path is not None:
            console.print(f"{task.path}: {len(task.prompts):,} lines", soft_wrap=True)
    seconds = shown.seconds.get(_MODEL, 0.0)
    rate = f" ({tokens / seconds:,.0f} a second)" if seconds else ""
    console.print(f"{tokens:,} tokens in {seconds:.1f} s{rate}, compilation included")


@dataclasses.dataclass(frozen=True)
class _How:
    mode: Mode
    length: int
    decoder: Decoder
    seed: int
    batch_size: int
    checkpoint_period: int


def _task(
    file: str,
    mode: Mode,
    vocabulary: tokenizer.Tokenizer,
    lengths: Mapping[str, int],
    output: pathlib.Path | None,
    console: rich.console.Console,
) -> Task:
    found = prompt_files.read(file)
    name = prompt_files.name(file)
    wanted = {"inputs": [prompt.inputs for prompt in found]}
    if mode == "score":
        if any(prompt.targets is None for prompt in found):
            raise ValueError(
                f"{file} has prompts without `targets`, which mode score needs: give JSON lines "
                "with `inputs` and `targets`"
            )
        wanted["targets"] = [prompt.targets or "" for prompt in found]
    columns = []
    for feature, texts in wanted.items():
        encoded, cut = prompt_files.encode(texts, vocabulary, lengths[feature])
        columns.append(encoded)
        note = f", {cut:,} cut to {lengths[feature]}" if cut else ""
        tokens = sum(ids.size for ids in encoded)
        console.print(f"{name}: {len(encoded):,} {feature}, {tokens:,} tokens{note}")
    path = None if output is None else output / f"{name}-{mode}.jsonl-00000-of-00001"
    return Task(name, found, columns, path)


def _run_task(model: TextModel, task: Task, how: _How, made_with: str, shown: Progress) -> int:
    """Chunk by chunk, each in its own file until all are there; returns how many tokens it took."""
    total = 0
    chunk = how.batch_size * how.checkpoint_period
    parts: list[pathlib.Path] = []
    for number, first in enumerate(range(0, len(task.prompts), chunk)):
        rows = slice(first, first + chunk)
        kept = None
        if task.path is not None:
            kept = task.path.with_name(f"{task.path.name}.{made_with}.chunk{number:05}")
            parts.append(kept)
        asked = hashlib.sha256(repr(task.prompts[rows]).encode()).hexdigest()
        if kept is not None and _done(kept, asked):
            progress.advance(shown, float(len(task.prompts[rows])), task.name, 0, 0.0)
            continue
        columns = [column[rows] for column in task.columns]
        found, tokens = _answers(model, columns, how, number, task.name, shown)
        total += tokens
        lines = [
            _line(prompt, result) for prompt, result in zip(task.prompts[rows], found, strict=True)
        ]
        if kept is None:
            sys.stdout.write("".join(lines))
            sys.stdout.flush()
        else:
            array_files.write_text(kept, f"{asked}\n" + "".join(lines))
        progress.line(shown, f"{task.name}: {min(first + chunk, len(task.prompts)):,} answers")
    if task.path is not None:
        with array_files.replacing(task.path) as merged:
            for part in parts:
                merged.write(part.read_bytes().partition(b"\n")[2])
        # Also those that a stopped run with other settings left.
        for part in task.path.parent.glob(f"{glob.escape(task.path.name)}.*.chunk*"):
            part.unlink()
    return total


def _done(part: pathlib.Path, asked: str) -> bool:
    """Whether a part of an earlier run answers the same prompts."""
    if not part.exists():
        return False
    with part.open() as file:
        return file.readline().strip() == asked


def _answers(
    model: TextModel,
    columns: Sequence[Sequence[Int32[np.ndarray, " _"]]],
    how: _How,
    chunk: int,
    name: str,
    shown: Progress,
) -> tuple[list[dict[str, Any]], int]:
    """What is written of each prompt, and how many tokens were made or scored."""
    results: list[dict[str, Any]] = [{} for _ in columns[0]]
    total, begun = 0, time.perf_counter()
    with progress.timed(shown, _MODEL):
        for rows, found, tokens in _batches(model, columns, how, chunk):
            for row, result in zip(rows, found, strict=True):
                results[row] = result
            spent, begun = time.perf_counter() - begun, time.perf_counter()
            progress.advance(shown, float(len(rows)), name, tokens, spent)
            total += tokens
    return results, total


def _batches(
    model: TextModel, columns: Sequence[Sequence[Int32[np.ndarray, " _"]]], how: _How, chunk: int
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


def _model_info(config: SwitchConfig) -> str:
    shapes = configs.param_shapes(config)
    lines = [
        f"Variable {name:<80} size {math.prod(shape):<12} shape {shape}\n"
        for name, shape in sorted(shapes.items())
    ]
    total = sum(map(math.prod, shapes.values()))
    return "".join([*lines, f"Total number of parameters: {total}\n"])


def _fingerprint(path: str, *settings: Any) -> str:
    """Of what decides the answers: parts that other settings made are not taken."""
    changed = os.stat(path).st_mtime_ns if os.path.exists(path) else 0
    return hashlib.sha256(repr((path, changed, settings)).encode()).hexdigest()[:8]
