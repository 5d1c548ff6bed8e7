# SPDX-License-Identifier: Apache-2.0
"""All samples through one block at a time: the parts of the model that are no experts.

A walk goes `start` (or `prepare` and `embed`), then for each block `run_block` (and, in a sparse
block, the experts: `experts.py`) and `advance`, then `finish`; the decoder's walk reads the
encoder's result. Each batch is computed while the one before it is copied back to the host.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Float64, Int, Int32

from qmoe_jax.calibration import buffers
from qmoe_jax.calibration.buffers import Batch, TokenBuffer
from qmoe_jax.calibration.data import SampleSet
from qmoe_jax.models import switch
from qmoe_jax.models.attention import decoder_masks, encoder_masks
from qmoe_jax.models.block import Block
from qmoe_jax.models.config import Stack, SwitchConfig

Params = Mapping[str, Any]

_REMEDY = (
    "Set ACTIVATION_DTYPE='float32' if it is not; else a weight before is too large, and the "
    "checkpoint damaged"
)


@dataclasses.dataclass(frozen=True)
class Routes:
    """Where a sparse block sends each token of a buffer."""

    expert: Int32[np.ndarray, " tokens"]
    prob: Float32[np.ndarray, " tokens"]


@dataclasses.dataclass(frozen=True)
class Activations:
    """The samples on their way through one stack of one version of the model."""

    stack: Stack
    samples: SampleSet
    batches: list[Batch]
    current: TokenBuffer  # A: the committed input of the next block
    updated: TokenBuffer  # B: its output, once the dense part and all experts have run
    encoded: TokenBuffer | None  # the finished encoder outputs, in the decoder's walk


@dataclasses.dataclass(frozen=True)
class SampleLosses:
    """Masked-span cross-entropy, summed over each sample's targets."""

    total: Float64[np.ndarray, " samples"]  # nats
    targets: Int[np.ndarray, " samples"]

    @property
    def mean(self) -> float:
        """Nats per target token over all samples."""
        return float(self.total.sum() / self.targets.sum())

    @property
    def standard_error(self) -> float:
        """Of `mean`, from the spread between samples (a ratio estimate)."""
        residual = self.total - self.mean * self.targets
        return float(np.sqrt(np.sum(residual**2)) / self.targets.sum())

    def minus(self, other: "SampleLosses") -> "SampleLosses":
        """The difference from another version's losses on the same samples, sample by sample.

        Its error is less than that of either: what makes a sample hard or easy cancels out.
        """
        return SampleLosses(self.total - other.total, other.targets)


def prepare(
    samples: SampleSet,
    stack: Stack,
    width: int,
    dtype: DTypeLike,
    *,
    batch_tokens: int,
    part: tuple[int, int] = (0, 1),
    encoded: TokenBuffer | None = None,
    folder: pathlib.Path | None = None,
    kept: pathlib.Path | None = None,
) -> Activations:
    """Room for the activations of all samples, or of a process's part of them.

    Args:
      samples: the tokens.
      stack: "decoder" needs `encoded`.
      width: of the residual stream.
      dtype: of the activations and their buffers.
      batch_tokens: padded positions of a batch, about.
      part: which process this is, and of how many: it has every so-manieth batch.
      encoded: what `finish` of the encoder gave.
      folder: where the buffers go as memory-mapped files; None keeps them in memory.
      kept: that of the files which holds `current` already; None makes both anew.

    Raises:
      OSError: the buffers' disk is full, or a file is there that is not `kept`.
    """
    index, count = part
    batches = sample_batches(samples, stack, batch_tokens)[index::count]
    offsets = _offsets(samples, stack)
    if count > 1:
        own = owners(samples, stack, batch_tokens, count) == index
        lengths = np.where(own, np.diff(offsets), 0)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    files = [None, None] if folder is None else [folder / f"{stack}.{half}" for half in "ab"]
    if kept == files[1]:
        files.reverse()
    current, updated = (
        buffers.attach(offsets, width, jnp.dtype(dtype), kept)
        if kept is not None and file == kept
        else buffers.create(offsets, width, jnp.dtype(dtype), file)
        for file in files
    )
    return Activations(stack, samples, batches, current, updated, encoded)


def sample_batches(samples: SampleSet, stack: Stack, batch_tokens: int) -> list[Batch]:
    """All samples in batches of about so many padded positions."""
    lengths = samples.encoder_lengths[:, None]
    if stack == "decoder":
        lengths = np.stack([samples.decoder_lengths, samples.encoder_lengths], axis=1)
    return buffers.length_batches(lengths, batch_tokens)


def owners(
    samples: SampleSet, stack: Stack, batch_tokens: int, count: int
) -> Int[np.ndarray, " samples"]:
    """The process, of `count`, that has each sample."""
    owner = np.zeros(len(samples), np.int64)
    for place, batch in enumerate(sample_batches(samples, stack, batch_tokens)):
        owner[batch.samples[batch.samples >= 0]] = place % count
    return owner


def num_tokens(activations: Activations) -> int:
    """Of all samples, also those that other processes have."""
    return int(_offsets(activations.samples, activations.stack)[-1])


def global_rows(activations: Activations) -> Int[np.ndarray, " tokens"]:
    """Where the rows of a part's buffers would be in those of all samples, ascending."""
    lengths = np.diff(_offsets(activations.samples, activations.stack))
    own = activations.current.lengths > 0  # no sample is empty
    return np.flatnonzero(np.repeat(own, lengths))


def _offsets(samples: SampleSet, stack: Stack) -> Int[np.ndarray, " samples_plus_1"]:
    return samples.encoder_offsets if stack == "encoder" else samples.decoder_offsets


def embed(params: Params, activations: Activations) -> None:
    """Writes the embedded samples into `current`; `params` are those outside of the layers."""
    embedding = {"token_embedder": params["token_embedder"]}
    current = activations.current
    for batch in activations.batches:
        tokens = _tokens(activations, batch)[0 if activations.stack == "encoder" else 1]
        embedded = _embed(embedding, tokens, current.data.dtype)
        buffers.write_batch(current, batch, np.asarray(embedded))


def start(
    params: Params, samples: SampleSet, stack: Stack, dtype: DTypeLike, **where: Any
) -> Activations:
    """`prepare`, to which `where` goes, and `embed`."""
    width = params["token_embedder"]["embedding"].shape[1]
    activations = prepare(samples, stack, width, dtype, **where)
    embed(params, activations)
    return activations


def no_routes(activations: Activations) -> Routes:
    """Room for where a block sends each token."""
    tokens = activations.current.data.shape[0]
    return Routes(np.zeros(tokens, np.int32), np.zeros(tokens, np.float32))


def run_block(
    block: Block,
    params: Params,
    layer_params: Params,
    activations: Activations,
    routes: Routes | None = None,
) -> Routes | None:
    """Runs all samples through a block, from `current` to `updated`.

    Args:
      block: which.
      params: those outside of the layers.
      layer_params: the block's own.
      activations: those batches of them that are to be run.
      routes: where those of a sparse block go; None makes new ones.

    Returns:
      The routes of a sparse block, whose experts have not run yet; None of a dense one.

    Raises:
      ValueError: an activation is NaN or infinite; names the sample.
    """
    if block.sparse and routes is None:
        routes = no_routes(activations)
    bias_params = {block.stack: {"relpos_bias": params[block.stack]["relpos_bias"]}}

    @functools.cache
    def bias_HLL(length: int):
        return _relpos_bias(block, bias_params, length)

    def function(x_BLD, tokens, encoded_BSD):
        bias = bias_HLL(x_BLD.shape[1])
        out = _run_block(block, layer_params, x_BLD, tokens, bias, encoded_BSD)
        return *out, _finite(out[0])

    for batch, (x_BLD, expert_BL, prob_BL, finite) in _batched(function, activations):
        buffers.write_batch(activations.updated, batch, x_BLD)
        if not finite:
            _check_finite(activations, batch, activations.current, "before this block's dense part")
            _check_finite(activations, batch, activations.updated, "in this block's dense part")
        if routes is not None:
            _scatter(activations, batch, expert_BL, routes.expert)
            _scatter(activations, batch, prob_BL, routes.prob)
    return routes


def advance(activations: Activations) -> Activations:
    """Commits a block: its output is the next block's input."""
    return dataclasses.replace(
        activations, current=activations.updated, updated=activations.current
    )


def finish(params: Params, activations: Activations, dtype: DTypeLike) -> TokenBuffer:
    """The stack's normed output, written over `updated`.

    Raises:
      ValueError: an activation is NaN or infinite; names the sample.
    """
    norm = {activations.stack: params[activations.stack]}

    def function(*arguments):
        out = _final_norm(activations.stack, jnp.dtype(dtype), norm, *arguments)
        return out, _finite(out), _finite(arguments[0])

    for batch, (x_BLD, *finite) in _batched(
        function, dataclasses.replace(activations, encoded=None)
    ):
        buffers.write_batch(activations.updated, batch, x_BLD)
        if not all(finite):
            _check_finite(activations, batch, activations.current, "in the stack's last block")
            _check_finite(activations, batch, activations.updated, "in the norm after it")
    return activations.updated


def losses(config: SwitchConfig, params: Params, activations: Activations) -> SampleLosses:
    """Cross-entropy of every target, from the decoder's finished output in `updated`.

    Raises:
      ValueError: a loss is NaN or infinite; names the sample.
    """
    total = np.zeros(len(activations.samples))
    finished = dataclasses.replace(advance(activations), encoded=None)
    outer = {"token_embedder": params["token_embedder"], "decoder": params["decoder"]}
    for batch, loss_B in _batched(functools.partial(_losses, config, outer), finished):
        present = batch.samples >= 0
        total[batch.samples[present]] = loss_B[present]
        if (wrong := batch.samples[present][~np.isfinite(loss_B[present])]).size:
            raise ValueError(f"the loss of sample {wrong[0]} becomes NaN or infinite. {_REMEDY}")
    return SampleLosses(total, activations.samples.decoder_lengths)


def _batched(function, activations: Activations) -> Iterator[tuple[Batch, Any]]:
    """`function(x, tokens, encoded)` for every batch, the next one running while one is yielded."""
    running = None
    for batch in activations.batches:
        x_BLD = jnp.asarray(buffers.read_batch(activations.current, batch))
        encoded = None
        if activations.encoded is not None:
            encoded = jnp.asarray(buffers.read_batch(activations.encoded, batch, side=1))
        result = function(x_BLD, _tokens(activations, batch), encoded)
        jax.tree.map(lambda array: array.copy_to_host_async(), result)
        if running is not None:
            yield running[0], jax.tree.map(np.asarray, running[1])
        running = batch, result
    if running is not None:
        yield running[0], jax.tree.map(np.asarray, running[1])


def _tokens(activations: Activations, batch: Batch) -> tuple[Int[np.ndarray, "B _"], ...]:
    """Padded ids: the encoder's inputs; in the decoder's walk also its inputs and targets."""
    samples = activations.samples

    def read(tokens, offsets, side):
        return buffers.read_batch(TokenBuffer(tokens[:, None], offsets), batch, side)[..., 0]

    if activations.stack == "encoder":
        return (read(samples.encoder_input_tokens, samples.encoder_offsets, 0),)
    return (
        read(samples.encoder_input_tokens, samples.encoder_offsets, 1),
        read(samples.decoder_input_tokens, samples.decoder_offsets, 0),
        read(samples.decoder_target_tokens, samples.decoder_offsets, 0),
    )


def _check_finite(activations: Activations, batch: Batch, buffer: TokenBuffer, where: str) -> None:
    """Padding, which no token sees, may hold anything."""
    for sample in batch.samples[batch.samples >= 0]:
        rows = slice(*activations.updated.offsets[sample : sample + 2])
        if not np.isfinite(buffer.data[rows].astype(np.float32)).all():
            raise ValueError(
                f"activations of sample {sample} become NaN or infinite {where}, in "
                f"{buffer.data.dtype.name}. {_REMEDY}"
            )


def _scatter(activations: Activations, batch: Batch, values_BL, out: np.ndarray) -> None:
    buffers.write_batch(
        TokenBuffer(out[:, None], activations.current.offsets), batch, values_BL[..., None]
    )


@functools.partial(jax.jit, static_argnums=2)
def _embed(params: Params, tokens_BL, dtype) -> Float[Array, "B L D"]:
    return switch.embed(params, tokens_BL, dtype)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _relpos_bias(block: Block, params: Params, length: int) -> Float[Array, "H L L"]:
    return switch.relpos_bias(block.config, params, block.stack, length, block.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _run_block(block: Block, layer_params: Params, x_BLD, tokens, bias_HLL, encoded_BSD):
    arguments = (x_BLD, _masks(tokens), bias_HLL, encoded_BSD)
    if block.sparse:
        out = block.apply({"params": layer_params}, *arguments, method="dense_part")
        return out[0].astype(x_BLD.dtype), *out[1:]
    out_BLD = jnp.asarray(block.apply({"params": layer_params}, *arguments))
    return out_BLD.astype(x_BLD.dtype), None, None


@jax.jit
def _finite(x_BLD):
    """A program of its own, so that it does not change how the block's is fused."""
    return jnp.all(jnp.isfinite(x_BLD))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _final_norm(stack: Stack, dtype, params: Params, x_BLD, tokens, _encoded):
    return switch.final_norm(params, stack, x_BLD, _masks(tokens), dtype)


@functools.partial(jax.jit, static_argnums=0)
def _losses(config: SwitchConfig, params: Params, x_BLD, tokens, _encoded):
    targets_BL = tokens[2]
    logits_BLV = switch.logits(config, params, x_BLD)
    chosen_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    # Not log_softmax, which would write another array over the vocabulary.
    loss_BL = jax.nn.logsumexp(logits_BLV, axis=-1) - chosen_BL
    return jnp.sum(jnp.where(targets_BL > 0, loss_BL, 0.0), axis=1)


def _masks(tokens):
    if len(tokens) == 1:
        return encoder_masks(tokens[0])
    encoder_inputs, decoder_inputs, decoder_targets = tokens
    return decoder_masks(decoder_inputs, decoder_targets, encoder_inputs)
