# SPDX-License-Identifier: Apache-2.0
"""An endless stream of span-corrupted batches, which can be entered at any sample."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from qmoe_jax.calibration import corpora, data, segments, span_corruption
from qmoe_jax.calibration.data import Sample
from qmoe_jax.calibration.text import Text
from qmoe_jax.calibration.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TrainingText(Text):
    """The text to train on; as for other runs, but cut to length, as T5 pre-trains.

    `validation_files` None means no validation; its samples have T5's usual noise.

    Attributes:
      noise_density: share of tokens that are masked; more gives small models more to learn from.
      mean_noise_span_length: mean tokens of a masked span.
    """

    document_mode: str = "split"
    noise_density: float = span_corruption.NOISE_DENSITY
    mean_noise_span_length: float = span_corruption.MEAN_SPAN


class Batch(NamedTuple):
    """Samples of equal length, int32; 0 is padding. In the order in which the model takes them.

    The arrays are NumPy's until they are put on devices.
    """

    encoder_input_tokens: Any  # [B, S]
    decoder_input_tokens: Any  # [B, L]
    decoder_target_tokens: Any  # [B, L]


class Lengths(NamedTuple):
    """Tokens of a padded sample, EOS included, and of the text that it is made of."""

    inputs: int
    targets: int
    raw_tokens: int


def lengths(text: TrainingText) -> Lengths:
    """Lengths of the batches; the text's options must have been checked (`text.load`).

    Raises:
      ValueError: a noise that cannot be, or one whose targets are longer than those wanted.
    """
    wanted = text.task_feature_lengths
    needed = span_corruption.span_lengths(
        wanted["inputs"], text.noise_density, text.mean_noise_span_length
    )
    targets = wanted.get("targets", needed.targets)
    if targets < needed.targets:
        raise ValueError(
            f"TASK_FEATURE_LENGTHS has targets {targets}, but inputs of {wanted['inputs']} tokens "
            f"make up to {needed.targets} with NOISE_DENSITY {text.noise_density}: leave `targets` "
            "out or raise it"
        )
    return Lengths(wanted["inputs"], targets, needed.raw_tokens)


def training_samples(
    text: TrainingText, vocabulary: Tokenizer, first_sample: int = 0
) -> Iterator[Sample]:
    """Yields samples `first_sample` on, epoch after epoch, without end.

    Sample n depends on the text, the seed and n alone. Each epoch has an order of its own, and each
    sample its own noise. Samples before the first are tokenized, but not corrupted.

    Raises:
      ValueError: the text gives no sample, or cannot be read (`corpora.documents`).
    """
    raw = itertools.chain.from_iterable(
        _epoch(text, vocabulary, epoch) for epoch in itertools.count()
    )
    for index, tokens in enumerate(raw):
        if index >= first_sample:
            yield data.make_sample(
                tokens,
                vocabulary,
                seed=text.seed,
                index=index,
                noise_density=text.noise_density,
                mean_span=text.mean_noise_span_length,
            )


def _epoch(text: TrainingText, vocabulary: Tokenizer, epoch: int) -> Iterator[np.ndarray]:
    """Yields one epoch's segments."""
    tally: Counter[str] = Counter()
    rng = np.random.default_rng([text.seed, epoch])
    documents = corpora.shuffled(corpora.documents(text.files), rng, data.SHUFFLE_BUFFER)
    found = segments.token_segments(
        documents, vocabulary, lengths(text).raw_tokens, text.document_mode, tally
    )
    number = 0
    for number, tokens in enumerate(found, start=1):  # noqa: B007, counted
        yield tokens
    if not number:
        raise ValueError(_no_sample(text, tally))


def _no_sample(text: TrainingText, tally: Counter[str]) -> str:
    remedy = "give more text"
    if tally["too_long"]:
        remedy += ", or DOCUMENT_MODE='split', which cuts long documents"
    return (
        f"TRAIN_FILES {text.files} gave no sample: of {tally['documents_read']} documents "
        f"{tally['too_long']} had more than {lengths(text).raw_tokens} tokens, and none of the "
        f"others 2 or more; {remedy}"
    )


def batched(samples: Iterable[Sample], batch_size: int, shape: Lengths) -> Iterator[Batch]:
    """Yields batches of `batch_size` rows; a last incomplete one is filled with empty rows."""
    stream = iter(samples)
    while rows := list(itertools.islice(stream, batch_size)):
        yield Batch(
            data.padded([row.encoder_input_tokens for row in rows], batch_size, shape.inputs),
            data.padded([row.decoder_input_tokens for row in rows], batch_size, shape.targets),
            data.padded([row.decoder_target_tokens for row in rows], batch_size, shape.targets),
        )
