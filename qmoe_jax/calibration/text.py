# SPDX-License-Identifier: Apache-2.0
"""From a user's files to samples: which text, which tokenizer, how long."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from qmoe_jax.calibration import corpora, data, span_corruption, tokenizer
from qmoe_jax.calibration.data import SampleSet
from qmoe_jax.calibration.tokenizer import Tokenizer

Files: TypeAlias = Sequence[str] | str

SAMPLES_PER_EXPERT = 10_000 / 128  # the paper's: 10K for 128 experts, 160K for 2,048


@dataclasses.dataclass(frozen=True)
class Text:
    """The text of a run and how it becomes samples.

    Attributes:
      sentencepiece_model_file: of the model's own vocabulary; `eval` takes a pack's if it is None.
      files: text or JSON-lines files, folders, globs, `task:NAME` of SeqIO (`corpora.documents`).
      validation_files: text that no sample is calibrated on; None holds samples back from `files`.
        `evaluate` also takes a dict, corpus -> its files.
      extra_ids: sentinels to add to a tokenizer that has none (T5's `cc_all.32000` wants 100).
      task_feature_lengths: as in T5X; `inputs` decides, `targets` follows from it (512 -> 114).
      document_mode: "skip" leaves out documents that do not fit, "split" cuts them.
      seed: of the order of the documents and of the masked spans.
    """

    sentencepiece_model_file: str | None = None
    files: Files = ()
    validation_files: Files | Mapping[str, Files] | None = None
    extra_ids: int | None = None
    task_feature_lengths: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"inputs": 512, "targets": 114}
    )
    document_mode: str = "skip"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Samples:
    """What a run calibrates on, and what it is judged by; no sample is in both."""

    lowest_sentinel_id: int
    calibration: SampleSet | None
    validation: SampleSet | None
    vocabulary: bytes | None = None  # `Tokenizer.model`


def load(text: Text, vocab_size: int, num_calibration: int, num_validation: int) -> Samples:
    """Samples for a model with `vocab_size` rows in its embedding.

    Raises:
      ValueError: too little text, files or lengths that cannot be, a tokenizer of another model, or
        a dict of corpora.
    """
    if isinstance(text.validation_files, Mapping):
        raise ValueError(
            f"VALIDATION_FILES is a dict ({_names(text.validation_files)}): only eval gives losses "
            "by corpus; expected files, a folder, a glob or a list of them"
        )
    if num_validation < 0:
        raise ValueError(f"NUM_VALIDATION_SAMPLES is {num_validation}; expected 0 or more")
    vocabulary, read = _reader(text, vocab_size)
    if num_calibration and text.validation_files and text.validation_files == text.files:
        raise ValueError(
            "VALIDATION_FILES and CALIBRATION_FILES are the same text: give other text, or leave "
            "VALIDATION_FILES out to hold samples back"
        )
    held_back = bool(num_validation) and text.validation_files is None
    if not text.files and (num_calibration or held_back):
        raise ValueError(
            "CALIBRATION_FILES is not set; expected text or JSON-lines files, a folder, a glob or "
            "task:NAME of SeqIO"
        )
    if not held_back:
        calibration = read(text.files, num_calibration, text.seed) if num_calibration else None
        validation = None
        if num_validation:
            validation = read(text.validation_files or (), num_validation, _validation_seed(text))
        return Samples(vocabulary.lowest_sentinel_id, calibration, validation, vocabulary.model)
    both = read(text.files, num_calibration + num_validation, text.seed)
    validation = data.stack_samples([both[i] for i in range(num_calibration, len(both))])
    calibration = data.stack_samples([both[i] for i in range(num_calibration)], both.counts)
    return Samples(vocabulary.lowest_sentinel_id, calibration, validation, vocabulary.model)


def load_corpora(text: Text, vocab_size: int, num_samples: int) -> dict[str, SampleSet]:
    """`num_samples` samples of each corpus of `text.validation_files`, a dict.

    Those of a corpus are the validation samples that `load` makes of its files alone.

    Raises:
      ValueError: see `load`, naming the corpus whose text it is; no corpus, or one without a name.
    """
    files = text.validation_files
    if not isinstance(files, Mapping) or not files or not all(files):
        raise ValueError(
            f"VALIDATION_FILES is {files!r}; expected at least one corpus, as in "
            "{'wiki': 'wiki.jsonl'}"
        )
    _, read = _reader(text, vocab_size)
    samples = {}
    for name, own in files.items():
        try:
            samples[name] = read(own, num_samples, _validation_seed(text))
        except ValueError as error:
            raise ValueError(f"corpus {name!r} of VALIDATION_FILES: {error}") from error
    return samples


def _reader(
    text: Text, vocab_size: int
) -> tuple[Tokenizer, Callable[[Files, int, int], SampleSet]]:
    """The tokenizer, and what makes a number of samples of files with a seed."""
    if text.seed < 0:
        raise ValueError(f"SEED is {text.seed}; expected 0 or more")
    vocabulary = tokenizer.load_tokenizer(text.sentencepiece_model_file, text.extra_ids)
    tokenizer.check_fits(vocabulary, vocab_size)
    inputs_length = _inputs_length(text.task_feature_lengths)

    def read(files: Files, number: int, seed: int) -> SampleSet:
        return data.make_samples(
            corpora.documents(files),
            vocabulary,
            number,
            seed=seed,
            inputs_length=inputs_length,
            document_mode=text.document_mode,
        )

    return vocabulary, read


def _validation_seed(text: Text) -> int:
    """Another one: a document that is calibrated on too would be masked in the same places."""
    return text.seed + 1


def _names(corpora_files: Mapping[str, Files]) -> str:
    return ", ".join(corpora_files) or "empty"


def num_calibration_samples(num_experts: int, wanted: int | None) -> int:
    """As many as wanted, or the paper's share for each expert of a layer.

    Raises:
      ValueError: a negative number.
    """
    if wanted is not None and wanted < 1:
        raise ValueError(f"NUM_SAMPLES is {wanted}; expected 1 or more")
    return wanted or round(SAMPLES_PER_EXPERT * num_experts)


def _inputs_length(lengths: Mapping[str, int]) -> int:
    unknown = set(lengths) - {"inputs", "targets"}
    if unknown or "inputs" not in lengths:
        raise ValueError(
            f"TASK_FEATURE_LENGTHS is {dict(lengths)}; expected a dict with `inputs`, and "
            "`targets` or not"
        )
    needed = span_corruption.span_lengths(lengths["inputs"]).targets
    if lengths.get("targets", needed) < needed:
        raise ValueError(
            f"TASK_FEATURE_LENGTHS has targets {lengths['targets']}, but inputs of "
            f"{lengths['inputs']} tokens make up to {needed}: leave `targets` out or raise it"
        )
    return lengths["inputs"]
