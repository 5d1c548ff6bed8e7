# SPDX-License-Identifier: Apache-2.0
"""From a user's files to samples: which text, which tokenizer, how long."""

import dataclasses
from collections.abc import Mapping, Sequence

from qmoe_jax.calibration import corpora, data, span_corruption, tokenizer
from qmoe_jax.calibration.data import SampleSet

SAMPLES_PER_EXPERT = 10_000 / 128  # the paper's: 10K for 128 experts, 160K for 2,048


@dataclasses.dataclass(frozen=True)
class Text:
    """The text of a run and how it becomes samples.

    Attributes:
      sentencepiece_model_file: of the model's own vocabulary.
      files: text or JSON-lines files, folders, globs, `task:NAME` of SeqIO (`corpora.documents`).
      validation_files: text that no sample is calibrated on; None holds samples back from `files`.
      extra_ids: sentinels to add to a tokenizer that has none (T5's `cc_all.32000` wants 100).
      task_feature_lengths: as in T5X; `inputs` decides, `targets` follows from it (512 -> 114).
      document_mode: "skip" leaves out documents that do not fit, "split" cuts them.
      seed: of the order of the documents and of the masked spans.
    """

    sentencepiece_model_file: str
    files: Sequence[str] | str = ()
    validation_files: Sequence[str] | str | None = None
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


def load(text: Text, vocab_size: int, num_calibration: int, num_validation: int) -> Samples:
    """Samples for a model with `vocab_size` rows in its embedding.

    Raises:
      ValueError: too little text, files or lengths that cannot be, or a tokenizer of another model.
    """
    if num_validation < 0:
        raise ValueError(f"NUM_VALIDATION_SAMPLES is {num_validation}; expected 0 or more")
    if text.seed < 0:
        raise ValueError(f"SEED is {text.seed}; expected 0 or more")
    vocabulary = tokenizer.load_tokenizer(text.sentencepiece_model_file, text.extra_ids)
    tokenizer.check_fits(vocabulary, vocab_size)
    inputs_length = _inputs_length(text.task_feature_lengths)
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

    def read(files: Sequence[str] | str, number: int, seed: int) -> SampleSet:
        return data.make_samples(
            corpora.documents(files),
            vocabulary,
            number,
            seed=seed,
            inputs_length=inputs_length,
            document_mode=text.document_mode,
        )

    if not held_back:
        calibration = read(text.files, num_calibration, text.seed) if num_calibration else None
        validation = None
        if num_validation:
            # Another seed: the same document would else be masked in the same places.
            validation = read(text.validation_files or (), num_validation, text.seed + 1)
        return Samples(vocabulary.lowest_sentinel_id, calibration, validation)
    both = read(text.files, num_calibration + num_validation, text.seed)
    validation = data.stack_samples([both[i] for i in range(num_calibration, len(both))])
    calibration = data.stack_samples([both[i] for i in range(num_calibration)], both.counts)
    return Samples(vocabulary.lowest_sentinel_id, calibration, validation)


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
