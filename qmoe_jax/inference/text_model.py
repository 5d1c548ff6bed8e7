# SPDX-License-Identifier: Apache-2.0
"""Text in, text out: a model with its vocabulary."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

import jax
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels import implementation as implementations
from pallas_kernels.implementation import Implementation
from qmoe_jax.calibration import tokenizer
from qmoe_jax.calibration.tokenizer import Tokenizer
from qmoe_jax.checkpoints import source
from qmoe_jax.checkpoints import vocabulary as vocabulary_files
from qmoe_jax.inference import beam_search, decoding, prompts, scoring, spans
from qmoe_jax.inference import load as models
from qmoe_jax.inference.beam_search import Beams
from qmoe_jax.inference.decoding import GREEDY, Sampling
from qmoe_jax.inference.model import Model
from qmoe_jax.inference.sharding import expert_mesh
from qmoe_jax.inference.simulated_dense import simulated_dense
from qmoe_jax.models import dtypes
from qmoe_jax.models.config import SwitchConfig

Decoder = Sampling | Beams
LENGTH = 114  # of an answer: T5's targets for inputs of 512 tokens


@dataclasses.dataclass(frozen=True)
class TextModel:
    """A Switch Transformer that takes and gives text; `load` makes it."""

    model: Model
    vocabulary: Tokenizer

    @overload
    def generate(
        self,
        prompts: str,
        *,
        length: int = LENGTH,
        decoder: Decoder = GREEDY,
        seed: int = 0,
        batch_size: int = 32,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompts: Sequence[str],
        *,
        length: int = LENGTH,
        decoder: Decoder = GREEDY,
        seed: int = 0,
        batch_size: int = 32,
    ) -> list[str]: ...

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        length: int = LENGTH,
        decoder: Decoder = GREEDY,
        seed: int = 0,
        batch_size: int = 32,
    ) -> str | list[str]:
        """What the model says to each prompt.

        Args:
          prompts: text; `<extra_id_0>` and so on are gaps that the model is to fill.
          length: tokens of an answer, at most.
          decoder: `Sampling(temperature=...)` draws tokens, `Beams()` searches; by default the
            likeliest token is taken each time.
          seed: of what is drawn.
          batch_size: prompts at a time.
        """
        if isinstance(prompts, str):
            return self.generate(
                [prompts], length=length, decoder=decoder, seed=seed, batch_size=batch_size
            )[0]
        answers = [""] * len(prompts)
        for part in answer(
            self,
            encode(self, prompts),
            length=length,
            decoder=decoder,
            key=random_key(seed),
            batch_size=batch_size,
        ):
            for i, row in zip(part.rows, part.tokens, strict=True):
                answers[i] = self.vocabulary.decode(row)
        return answers

    def fill(
        self, text: str, *, length: int = LENGTH, decoder: Decoder = GREEDY, seed: int = 0
    ) -> str:
        """The text, its gaps (`<extra_id_0>` and so on) filled in brackets; see `generate`."""
        rows, key = encode(self, [text]), random_key(seed)
        asked = answer(self, rows, length=length, decoder=decoder, key=key, batch_size=1)
        return spans.filled(rows[0], next(asked).tokens[0], self.vocabulary)

    def stream(
        self, prompt: str, *, length: int = LENGTH, sampling: Sampling = GREEDY, seed: int = 0
    ) -> Iterator[str]:
        """The answer to one prompt, piece by piece as it is decoded; see `generate`."""
        _, (ids,) = next(prompts.batches([encode(self, [prompt])], 1))
        spoken: list[int] = []
        said = ""
        for (token,) in decoding.stream(
            self.model,
            ids,
            length,
            sampling=sampling,
            key=jax.random.fold_in(random_key(seed), 0),  # as of the first batch of `answer`
            eos_id=self.vocabulary.eos_id,
        ):
            spoken.append(int(token))
            text = self.vocabulary.decode(spoken)
            yield text[len(said) :]
            said = text

    def score(
        self, inputs: Sequence[str], targets: Sequence[str], *, batch_size: int = 32
    ) -> Float[np.ndarray, " N"]:
        """Natural logarithm of the probability of each target, its end included, given its input.

        Raises:
          ValueError: not as many targets as inputs.
        """
        if isinstance(inputs, str) or isinstance(targets, str):
            raise ValueError("`inputs` and `targets` are lists of texts; got one text")
        if len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} `inputs` and {len(targets)} `targets`; expected equal")
        scores = np.zeros(len(inputs), np.float32)
        columns = [encode(self, inputs), encode(self, targets)]
        for rows, (inputs_BS, targets_BL) in prompts.batches(columns, batch_size):
            scores[rows] = scoring.score(self.model, inputs_BS, targets_BL)[: len(rows)]
        return scores


class Answers(NamedTuple):
    """Those of one batch."""

    rows: list[int]  # of the prompts
    tokens: Int32[np.ndarray, "B L"]
    log_prob: Float[np.ndarray, " B"]  # of beams: divided by the brevity penalty


def load(
    path: str | os.PathLike[str],
    *,
    sentencepiece_model_file: str | os.PathLike[str] | None = None,
    extra_ids: int | None = None,
    activation_dtype: str | None = None,
    implementation: Implementation = "auto",
    num_expert_partitions: int = 1,
    simulate_dense: bool = False,
) -> TextModel:
    """Reads a model and its vocabulary.

    Args:
      path: a packed checkpoint, whose experts stay packed, a T5X checkpoint (also a URL) or a
        Hugging Face folder.
      sentencepiece_model_file: None: the one that `compress` put into a packed checkpoint.
      extra_ids: sentinels to add to a tokenizer that has none.
      activation_dtype: "float32" or "bfloat16"; None: bfloat16 where the device computes in it.
      implementation: of the products with packed experts; see docs/kernels.md.
      num_expert_partitions: devices that share the experts of each layer.
      simulate_dense: for timings alone: the experts of a layer become one dense buffer.

    Raises:
      ValueError: no vocabulary, that of another model, devices that are not there or do not divide
        the experts; or no checkpoint or a damaged one (CheckpointError).
    """
    config = source.open_source(path).config
    check_machine(config, num_expert_partitions, implementation, simulate_dense)
    vocabulary = load_vocabulary(path, sentencepiece_model_file, extra_ids)
    tokenizer.check_fits(vocabulary, config.vocab_size)
    mesh = expert_mesh(num_expert_partitions) if num_expert_partitions > 1 else None
    dtype = dtypes.activation_dtype(activation_dtype)
    model = models.load(path, dtype=dtype, implementation=implementation, mesh=mesh)
    if simulate_dense:
        model = simulated_dense(model)
    return TextModel(model, vocabulary)


def check_machine(
    config: SwitchConfig,
    num_expert_partitions: int,
    implementation: Implementation,
    simulate_dense: bool,
) -> None:
    """Whether a model can be run so on this machine.

    Raises:
      ValueError: it has not so many devices, they do not divide the experts, or none is what these
        kernels are for; or experts that are no longer there were to be divided.
    """
    there, kind = jax.device_count(), jax.devices()[0].device_kind
    wanted, experts = num_expert_partitions, config.num_experts
    if not 1 <= wanted <= there or experts % wanted:
        raise ValueError(
            f"NUM_EXPERT_PARTITIONS is {wanted}; expected one that divides {experts} experts, from "
            f"1 to {there}, the devices that are there"
        )
    if simulate_dense and wanted > 1:
        raise ValueError(
            f"SIMULATE_DENSE has one buffer, not {experts} experts, for NUM_EXPERT_PARTITIONS "
            f"{wanted} to divide: leave one of them out"
        )
    if not implementations.available(implementation):
        raise ValueError(
            f"IMPLEMENTATION is {implementation!r}, whose kernels need an NVIDIA GPU of compute "
            f"capability 8.0 or newer; this is {kind}: leave it at 'auto'"
        )


def load_vocabulary(
    path: str | os.PathLike[str],
    sentencepiece_model_file: str | os.PathLike[str] | None = None,
    extra_ids: int | None = None,
) -> Tokenizer:
    """The vocabulary that is named, or else the one inside of the checkpoint at `path`.

    Raises:
      ValueError: there is none, or sentinels are to be added to a checkpoint's own.
    """
    if sentencepiece_model_file is not None:
        return tokenizer.load_tokenizer(sentencepiece_model_file, extra_ids)
    if extra_ids:
        raise ValueError(
            f"EXTRA_IDS is {extra_ids}, but SENTENCEPIECE_MODEL_FILE is not given: a packed "
            "checkpoint's own vocabulary has all its sentinels"
        )
    return tokenizer.load_tokenizer(vocabulary_files.kept(path))


def random_key(seed: int) -> Array:
    """The key of random numbers that a seed stands for.

    Raises:
      ValueError: a seed that there is no key for.
    """
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"SEED is {seed}; expected 0 to {(1 << 32) - 1}")
    return jax.random.key(seed)


def encode(model: TextModel, texts: Sequence[str]) -> list[Int32[np.ndarray, " _"]]:
    """Ids of texts of any length, EOS at their ends."""
    return prompts.encode(texts, model.vocabulary)[0]


def answer(
    model: TextModel,
    rows: Sequence[Int32[np.ndarray, " _"]],
    *,
    length: int,
    decoder: Decoder,
    key: Array,
    batch_size: int,
) -> Iterator[Answers]:
    """What the model says to each row of ids, batch by batch, in an order of its own.

    Raises:
      ValueError: answers of no tokens, or batches of no rows.
    """
    if length < 1:
        raise ValueError(f"`length` is {length}; expected 1 token or more")
    eos_id = model.vocabulary.eos_id
    for number, (chosen, (ids,)) in enumerate(prompts.batches([rows], batch_size)):
        if isinstance(decoder, Beams):
            beams = beam_search.beam_search(model.model, ids, length, beams=decoder, eos_id=eos_id)
            tokens, log_prob = beams[0][:, 0], beams[1][:, 0]
        else:
            own = jax.random.fold_in(key, number)
            tokens, log_prob = decoding.generate(
                model.model, ids, length, sampling=decoder, key=own, eos_id=eos_id
            )
        yield Answers(chosen, tokens[: len(chosen)], log_prob[: len(chosen)])
