# SPDX-License-Identifier: Apache-2.0
"""Runs a checkpoint, original or packed, on a user's prompts; writes what T5X's infer writes."""

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console

from pallas_kernels.implementation import Implementation
from qmoe_jax.calibration import tokenizer
from qmoe_jax.calibration.tokenizer import Tokenizer
from qmoe_jax.checkpoints import array_files, packed, source
from qmoe_jax.inference import prompts as prompt_files
from qmoe_jax.inference import text_model
from qmoe_jax.inference.beam_search import Beams
from qmoe_jax.inference.decoding import Sampling
from qmoe_jax.inference.text_model import Decoder
from qmoe_jax.models import config as configs
from qmoe_jax.models.config import SwitchConfig
from qmoe_jax.runs import answer_files, progress
from qmoe_jax.runs.answer_files import How, Mode, Task

LENGTHS: Mapping[str, int] = {"inputs": 512, "targets": text_model.LENGTH}


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are found, by T5X's names.

    Attributes:
      num_decodes: beams; 1 takes or draws one token after another, where T5X's 1 is one beam.
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
        if self.temperature or self.topk or self.topp:
            raise ValueError(
                f"NUM_DECODES is {self.num_decodes}, TEMPERATURE {self.temperature}, TOPK "
                f"{self.topk}, TOPP {self.topp}: beams are not drawn; leave NUM_DECODES or the "
                "others at their defaults"
            )
        return Beams(self.num_decodes, self.alpha)


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
    lengths = _checked_lengths(task_feature_lengths)
    decoder = decoding.decoder()
    text_model.random_key(seed)
    for name, number in (("BATCH_SIZE", batch_size), ("CHECKPOINT_PERIOD", checkpoint_period)):
        if number < 1:
            raise ValueError(f"{name} is {number}; expected 1 or more")
    checkpoint = source.open_source(checkpoint_path)
    config = checkpoint.config
    text_model.check_machine(config, num_expert_partitions, implementation, simulate_dense)
    vocabulary = text_model.load_vocabulary(checkpoint_path, sentencepiece_model_file, extra_ids)
    tokenizer.check_fits(vocabulary, config.vocab_size)
    output = None if infer_output_dir is None else _checked_output(infer_output_dir)
    tasks = _tasks(prompts, mode, vocabulary, lengths, output, console)
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
    if output is not None:
        array_files.write_text(output / "model-info.txt", _model_info(config))
    asked = (mode, lengths, decoder, seed, batch_size, checkpoint_period)
    computed = (activation_dtype, implementation, num_expert_partitions, simulate_dense)
    made_with = _fingerprint(checkpoint_path, vocabulary, asked, computed)
    how = How(mode, lengths["targets"], decoder, seed, batch_size, checkpoint_period, made_with)
    with progress.showing(float(sum(len(task.prompts) for task in tasks)), console) as shown:
        tokens = answer_files.run(model, tasks, how, shown)
    for task in tasks:
        if task.path is not None:
            console.print(f"{task.path}: {len(task.prompts):,} lines", soft_wrap=True)
    seconds = shown.seconds.get(answer_files.MODEL_PHASE, 0.0)
    rate = f" ({tokens / seconds:,.0f} a second)" if seconds else ""
    console.print(f"{tokens:,} tokens in {seconds:.1f} s{rate}, compilation included")


def _checked_lengths(given: Mapping[str, int]) -> dict[str, int]:
    lengths = dict(LENGTHS) | dict(given)
    if set(lengths) != set(LENGTHS) or min(lengths.values()) < 2:
        raise ValueError(
            f"TASK_FEATURE_LENGTHS is {lengths}; expected `inputs` and `targets` of 2 up"
        )
    return lengths


def _checked_output(folder: str) -> pathlib.Path:
    output = array_files.local_folder(folder)
    if packed.is_packed(output):
        raise ValueError(f"INFER_OUTPUT_DIR {output} is a packed checkpoint: choose another folder")
    return output


def _tasks(
    prompts: Sequence[str] | str,
    mode: Mode,
    vocabulary: Tokenizer,
    lengths: Mapping[str, int],
    output: pathlib.Path | None,
    console: rich.console.Console,
) -> list[Task]:
    files = prompt_files.files(prompts)
    tasks = [_task(file, mode, vocabulary, lengths, output, console) for file in files]
    if len({task.name for task in tasks}) < len(tasks) or not tasks:
        raise ValueError(f"PROMPTS is {files}; expected one or more files with different names")
    return tasks


def _task(
    file: str,
    mode: Mode,
    vocabulary: Tokenizer,
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


def _model_info(config: SwitchConfig) -> str:
    shapes = configs.param_shapes(config)
    lines = [
        f"Variable {name:<80} size {math.prod(shape):<12} shape {shape}\n"
        for name, shape in sorted(shapes.items())
    ]
    total = sum(map(math.prod, shapes.values()))
    return "".join([*lines, f"Total number of parameters: {total}\n"])


def _fingerprint(checkpoint_path: str, vocabulary: Tokenizer, *settings: Any) -> str:
    """Of all that decides the answers: what another model or setting answered is not taken."""
    folder = pathlib.Path(checkpoint_path)
    files = sorted(folder.iterdir()) if folder.is_dir() else []  # a URL's are not looked at
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    whole = repr((checkpoint_path, states, settings)).encode() + vocabulary.model
    return hashlib.sha256(whole).hexdigest()[:8]
