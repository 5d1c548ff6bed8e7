# SPDX-License-Identifier: Apache-2.0
"""One group of experts: Hessians from their tokens, the solve, the packed records."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import packed as packed_lib
from qmoe_jax.calibration import experts
from qmoe_jax.calibration.buffers import TokenBuffer
from qmoe_jax.calibration.experts import Assignment
from qmoe_jax.calibration.walk import Params
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.checkpoints.packed import Experts
from qmoe_jax.checkpoints.packed_manifest import Codec
from qmoe_jax.checkpoints.t5x_experts import ExpertGroup
from qmoe_jax.codec import packing, rates, uniform
from qmoe_jax.models.block import Block
from qmoe_jax.models.config import input_matrices
from qmoe_jax.quantization import gptq
from qmoe_jax.quantization.gptq import Quantized
from qmoe_jax.quantization.quantizer import Quantizer
from qmoe_jax.report import LayerRecord, MatrixRecord
from qmoe_jax.runs import progress
from qmoe_jax.runs.progress import Progress

Kernels = dict[str, jax.Array]  # matrix -> [group, in, out]

LARGEST = 3.3e38  # a weight; bfloat16 ends at 3.39e38


@dataclasses.dataclass(frozen=True)
class Formats:
    """What a run computes in and what it stores."""

    codec: Codec
    store_dtype: np.dtype  # of what is not packed
    dtype: np.dtype  # of the activations

    @property
    def store_bfloat16(self) -> bool:
        """Whether grids are stored in bfloat16, and so must be rounded before the solve."""
        return self.codec != "dense" or self.store_dtype != np.float32


@dataclasses.dataclass(frozen=True)
class HessianTokens:
    """A block's calibration tokens, and which of them count in whose Hessian."""

    buffer: TokenBuffer
    counted: Assignment
    cap: int  # of one expert
    routed: list[int]  # to each expert, counted or not


@dataclasses.dataclass(frozen=True)
class SolvedGroup:
    """What became of experts `start` to `stop`; lists run over the group."""

    start: int
    stop: int
    packed: dict[str, Experts]
    matrices: dict[str, MatrixRecord]
    tokens: list[int]
    hessian_tokens: list[int]
    fallbacks: dict[str, str]


def check_storable(quantizer: Quantizer, codec: Codec | None) -> Codec:
    """The codec asked for, or the natural one; refuses what it could not hold.

    Raises:
      ValueError: with the reason and the remedy.
    """
    natural: tuple[Codec, ...] = packing.CODECS if quantizer.bits == "ternary" else ("uniform",)
    if codec is None:
        codec = natural[0]
    if codec not in (*natural, "dense"):
        raise ValueError(
            f"CODEC {codec!r} does not hold {quantizer.bits} bits; expected one of "
            f"{(*natural, 'dense')}"
        )
    if codec in packing.CODECS and quantizer.group_size:
        raise ValueError(
            f"GROUP_SIZE {quantizer.group_size} with ternary bits cannot be packed: the format "
            "holds one minimum and maximum a row. Leave GROUP_SIZE out, or set CODEC='dense'"
        )
    if codec == "uniform" and quantizer.group_size and quantizer.activation_order:
        raise ValueError(
            "GROUP_SIZE with ACTIVATION_ORDER cannot be packed: groups are of permuted columns. "
            "Leave one of them out, or set CODEC='dense'"
        )
    return codec


def solve(
    quantizer: Quantizer,
    formats: Formats,
    block: Block,
    layer: int,
    layer_params: Params,
    group: ExpertGroup,
    tokens: HessianTokens | None,
    shown: Progress,
) -> tuple[dict[str, Quantized], Kernels, Kernels]:
    """Quantizes one group.

    Args:
      layer_params: of the compressed model; its layer norm makes the experts' inputs.
      group: its arrays are taken out of it.
      tokens: None rounds to nearest.

    Returns:
      What `pack` needs, the original kernels and the compressed ones.

    Raises:
      CheckpointError: a weight is not finite, or beyond bfloat16's range.
    """
    with progress.timed(shown, "transfer"):
        original = on_device(block.stack, layer, group)
    if tokens is None:
        quantized = _round_to_nearest(quantizer, formats, original)
    else:
        quantized = _gptq(quantizer, formats, block, layer_params, group, original, tokens, shown)
    return quantized, original, _as_stored(quantized, formats)


def on_device(stack: str, layer: int, group: ExpertGroup) -> Kernels:
    """A group's kernels on the device; its arrays are taken out of it.

    Raises:
      CheckpointError: a weight is not finite, or beyond bfloat16's range.
    """
    # The group is ours: leave no second copy on the host.
    kernels = {name: jnp.asarray(group.arrays.pop(name)) for name in list(group.arrays)}
    _check_range(stack, layer, group, kernels)
    return kernels


def pack(
    quantizer: Quantizer,
    formats: Formats,
    group: ExpertGroup,
    quantized: Mapping[str, Quantized],
    tokens: HessianTokens | None,
) -> SolvedGroup:
    """Packs a group that was solved, and records what became of it."""
    kernels = _as_stored(quantized, formats)
    packed = {
        name: kernels[name] if formats.codec == "dense" else _pack(quantizer, formats, result)
        for name, result in quantized.items()
    }
    experts_range = range(group.start, group.stop)
    return SolvedGroup(
        start=group.start,
        stop=group.stop,
        packed=packed,
        matrices={
            name: _matrix_record(quantizer, quantized[name], packed[name]) for name in quantized
        },
        tokens=[tokens.routed[e] for e in experts_range] if tokens else [],
        hessian_tokens=[len(_counted(tokens, e)) for e in experts_range] if tokens else [],
        fallbacks=_fallbacks(group, quantized, tokens),
    )


def nearest_kernels(quantizer: Quantizer, formats: Formats, original: Kernels) -> Kernels:
    """The round-to-nearest baseline's kernels, as they would be stored."""
    return _as_stored(_round_to_nearest(quantizer, formats, original), formats)


def layer_record(stack: str, layer: int, solved: list[SolvedGroup], seconds: float) -> LayerRecord:
    """The record of a layer from those of its groups, in order."""
    matrices = {}
    for name in solved[0].matrices:
        parts = [group.matrices[name] for group in solved]
        matrices[name] = MatrixRecord(
            error=[error for part in parts for error in part.error],
            level_counts=np.sum([part.level_counts for part in parts], axis=0).tolist(),
            zeros=sum(part.zeros for part in parts),
            weights=sum(part.weights for part in parts),
            bits=sum(part.bits for part in parts),
        )
    return LayerRecord(
        stack=stack,
        layer=layer,
        tokens=[count for group in solved for count in group.tokens],
        hessian_tokens=[count for group in solved for count in group.hessian_tokens],
        fallbacks={key: why for group in solved for key, why in group.fallbacks.items()},
        matrices=matrices,
        seconds=seconds,
    )


def _check_range(stack: str, layer: int, group: ExpertGroup, kernels: Kernels) -> None:
    for name, kernel in kernels.items():
        wrong = np.flatnonzero(~np.asarray(_in_range(kernel)))
        if wrong.size:
            raise CheckpointError(
                f"expert {group.start + wrong[0]} of `{stack}/layers_{layer}/mlp/expert/{name}"
                f"/kernel` holds NaN, infinity or a weight of {LARGEST:.1e} or more: the "
                "checkpoint is damaged, copy or convert it again."
            )


@jax.jit
def _in_range(kernel):
    """Whether all weights of each expert are finite, and small enough."""
    kernel = kernel.astype(jnp.float32)
    # The maximum alone would not do: on a CPU it may pass over NaN.
    finite = jnp.sum(kernel * 0.0, axis=(1, 2)) == 0
    return finite & (jnp.max(jnp.abs(kernel), axis=(1, 2)) < LARGEST)


def _as_stored(quantized: Mapping[str, Quantized], formats: Formats) -> Kernels:
    """What is computed with is what is stored: dense kernels are rounded, packed ones are exact."""
    kernels = {name: result.kernel for name, result in quantized.items()}
    if formats.codec != "dense":
        return kernels
    return {name: kernel.astype(formats.store_dtype) for name, kernel in kernels.items()}


def _round_to_nearest(
    quantizer: Quantizer, formats: Formats, original: Kernels
) -> dict[str, Quantized]:
    rounded = functools.partial(
        gptq.round_to_nearest, bits=quantizer.bits, store_bfloat16=formats.store_bfloat16
    )
    return {name: rounded(kernel) for name, kernel in original.items()}


def _gptq(
    quantizer, formats, block, layer_params, group, original, tokens, shown
) -> dict[str, Quantized]:
    """Hessians of both kinds in one pass, or, true-sequential, in two with the inputs solved."""
    solver = functools.partial(
        gptq.gptq,
        bits=quantizer.bits,
        options=quantizer.options,
        store_bfloat16=formats.store_bfloat16,
    )

    def solved(names, hessians) -> dict[str, Quantized]:
        with progress.timed(shown, "solve"):
            kinds = {name: "out" if name == "wo" else "in" for name in names}
            found = {name: solver(original[name], hessians[kinds[name]]) for name in names}
            return jax.block_until_ready(found)

    inputs = input_matrices(block.config.mlp_activations)
    if not quantizer.true_sequential:
        hessians = _hessians(block, layer_params, group, original, tokens, ("in", "out"), shown)
        return solved((*inputs, "wo"), hessians)
    hessians = _hessians(block, layer_params, group, original, tokens, ("in",), shown)
    first = solved(inputs, hessians)
    del hessians
    compressed = _as_stored(first, formats)
    hessians = _hessians(block, layer_params, group, compressed, tokens, ("out",), shown)
    return first | solved(("wo",), hessians)


def _hessians(block, layer_params, group, kernels, tokens, kinds, shown):
    with progress.timed(shown, "Hessians"):
        count = group.stop - group.start
        hessians = experts.zero_hessians(block.config, count, kinds)
        for place in range(count):
            hessians = experts.add_to_hessians(
                hessians,
                place,
                block,
                layer_params,
                experts.expert_kernels(kernels, place),
                tokens.buffer,
                _counted(tokens, group.start + place),
            )
        return jax.block_until_ready(hessians)


def _counted(tokens: HessianTokens, expert: int) -> np.ndarray:
    return tokens.counted.of(expert)[: tokens.cap]


def _pack(quantizer: Quantizer, formats: Formats, result: Quantized) -> Experts:
    if quantizer.bits == "ternary":
        row_values = jnp.moveaxis(result.grid[..., 0], 0, -1).astype(jnp.bfloat16)
        return packing.pack_ternary(result.levels, row_values, formats.codec)
    scale, zero = result.grid
    group_size = quantizer.group_size or uniform.WHOLE_ROW
    return uniform.pack_uniform(result.levels, scale, zero, quantizer.bits, group_size)


def _matrix_record(quantizer: Quantizer, result: Quantized, packed: Experts) -> MatrixRecord:
    """Ternary levels are counted by sign: a row's minimum or maximum may itself be 0."""
    size = result.kernel.size
    below, zeros = (int(np.asarray(counted).sum()) for counted in _signs(result.kernel))
    if quantizer.bits == "ternary":
        counts = [zeros, below, size - zeros - below]
    else:
        counts = np.asarray(_histogram(result.levels, 2**quantizer.bits), np.int64).sum(0)
    if isinstance(packed, packed_lib.PackedExperts | packed_lib.UniformExperts):
        stored = rates.bits_per_weight(packed)
        bits = stored.codes + stored.row_lengths + stored.row_values
    else:
        bits = 8 * packed.nbytes
    return MatrixRecord(
        error=[_finite(error) for error in np.asarray(result.error)],
        level_counts=[int(count) for count in counts],
        zeros=zeros,
        weights=size,
        bits=int(bits),
    )


@jax.jit
def _signs(kernel):
    """Negative weights and zeros of each expert."""
    return jnp.sum(kernel < 0, (1, 2)), jnp.sum(kernel == 0, (1, 2))


@functools.partial(jax.jit, static_argnums=1)
def _histogram(levels, number):
    """Weights of each expert on each level."""
    return jnp.stack([jnp.sum(levels == level, (1, 2)) for level in range(number)], axis=1)


def _fallbacks(
    group: ExpertGroup, quantized: Mapping[str, Quantized], tokens: HessianTokens | None
) -> dict[str, str]:
    if tokens is None:
        return {}
    found = {}
    not_pd = {name: np.asarray(result.not_pd) for name, result in quantized.items()}
    for place, expert in enumerate(range(group.start, group.stop)):
        if not len(_counted(tokens, expert)):
            found[str(expert)] = "no calibration tokens"
            continue
        matrices = [name for name, failed in not_pd.items() if failed[place]]
        if matrices:
            found[str(expert)] = f"Hessian not positive definite ({', '.join(matrices)})"
    return found


def _finite(value) -> float | None:
    return float(value) if np.isfinite(value) else None
