# SPDX-License-Identifier: Apache-2.0
"""The tokens routed to experts, in fixed shapes: Hessians of their matrices, and their outputs.

An expert's tokens are taken in buffer order. Hessians take them in loads, of which only the tiles
in use are computed; outputs in chunks of `CHUNK` rows and, for the rest, of `TAIL` rows. The last
piece is padded with zeros. So few shapes are compiled, and what an expert gets does not depend on
which other experts are in its group.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from qmoe_jax.calibration import buffers
from qmoe_jax.calibration.buffers import TokenBuffer
from qmoe_jax.calibration.walk import Params, Routes
from qmoe_jax.models.block import Block
from qmoe_jax.models.config import SwitchConfig, input_matrices
from qmoe_jax.models.layers import activate, add_residual, matmul, rms_norm
from qmoe_jax.models.moe import expert_mlp
from qmoe_jax.quantization import hessian

CHUNK, TAIL = 512, 128
LOAD, TILE = 4096, 512  # rows of a Hessian's load, and of one of its tiles: one product each
SMALL = 128  # what fits this many rows is a load of one such tile
_RUNNING = 4  # chunks on the device whose results have not been fetched

# One expert's matrices, [in, out], by name.
Kernels = Mapping[str, Float[Array, "_ _"]]

# Rows of a buffer, their number when padded, and a function of them and their probabilities.
Piece: TypeAlias = tuple[np.ndarray, int, Callable[[jax.Array, jax.Array], jax.Array]]


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The rows of a buffer sorted by expert."""

    rows: Int[np.ndarray, " routed"]
    starts: Int[np.ndarray, " experts_plus_1"]

    def of(self, expert: int) -> Int[np.ndarray, " N"]:
        """The rows of one expert, in buffer order."""
        return self.rows[self.starts[expert] : self.starts[expert + 1]]


def assign(
    routes: Routes, num_experts: int, keep: Bool[np.ndarray, " tokens"] | None = None
) -> Assignment:
    """Sorts tokens by expert; those dropped, or not in `keep`, belong to none."""
    expert = routes.expert if keep is None else np.where(keep, routes.expert, num_experts)
    counts = np.bincount(expert, minlength=num_experts + 1)[:num_experts]
    starts = np.concatenate([[0], np.cumsum(counts)])
    narrow = expert.astype(np.int16) if num_experts < 1 << 15 else expert  # sorted by radix
    return Assignment(np.argsort(narrow, kind="stable")[: starts[-1]], starts)


def token_cap(tokens: int, num_experts: int, factor: float) -> int:
    """Most tokens of one expert that its Hessian counts: `factor` times the mean over experts."""
    return math.ceil(factor * tokens / num_experts)


def zero_hessians(
    config: SwitchConfig, experts: int, kinds: Sequence[str] = ("in", "out")
) -> dict[str, Float[Array, "E _ _"]]:
    """Of what goes into the experts (`in`) and of their hidden units (`out`)."""
    widths = {"in": config.emb_dim, "out": config.expert_mlp_dim}
    return {kind: hessian.zeros(experts, widths[kind]) for kind in kinds}


def add_to_hessians(
    hessians: dict[str, Float[Array, "E _ _"]],
    place: int,
    block: Block,
    layer_params: Params,
    kernels: Kernels,
    buffer: TokenBuffer,
    rows: Int[np.ndarray, " N"],
) -> dict[str, Float[Array, "E _ _"]]:
    """Adds one expert's tokens at `place`; donates `hessians`, which may hold either or both."""
    layer = _Layer(block.config.mlp_activations, block.dtype)
    scale_D = layer_params["pre_mlp_layer_norm"]["scale"]
    kernels = {name: kernels[name] for name in input_matrices(layer.activations)}
    for start in range(0, len(rows), LOAD):
        piece = rows[start : start + LOAD]
        size, tile = (SMALL, SMALL) if len(piece) <= SMALL else (LOAD, TILE)
        x_ND = jnp.asarray(buffers.read_rows(buffer.data, piece, size))
        tiles, at = jnp.int32(-(-len(piece) // tile)), jnp.int32(place)
        hessians = _add_load(hessians, layer, tile, scale_D, kernels, x_ND, tiles, at)
    return hessians


def run_experts(
    block: Block,
    layer_params: Params,
    stacked: Mapping[str, Float[Array, "E _ _"]],
    first: int,
    buffer: TokenBuffer,
    routes: Routes,
    assignment: Assignment,
) -> None:
    """Adds `prob * expert(norm(x))` to the rows of a group of experts in `buffer`, in place.

    Args:
      block, layer_params: its layer norm makes the experts' inputs.
      stacked: the group's matrices, [expert, in, out], by name.
      first: the group's first expert.
      buffer: the residual stream after the dense part.
      routes: the probability of each row's expert.
      assignment: the rows of each expert.
    """
    layer = _Layer(block.config.mlp_activations, block.dtype)
    scale_D = layer_params["pre_mlp_layer_norm"]["scale"]

    def pieces() -> Iterator[Piece]:
        for place in range(len(stacked["wo"])):
            rows = assignment.of(first + place)
            kernels = expert_kernels(stacked, place) if len(rows) else {}
            for chunk, size in chunks(rows, CHUNK, TAIL):
                yield chunk, size, functools.partial(_run_chunk, layer, scale_D, kernels)

    run_pieces(buffer, routes, pieces())


def run_pieces(buffer: TokenBuffer, routes: Routes, pieces: Iterable[Piece]) -> None:
    """Replaces rows of `buffer` by a function of them, fetching while later pieces are computed.

    Args:
      buffer: the residual stream; no row may be in two pieces.
      routes: the probability of each row's expert.
      pieces: rows, the number that they are padded to with zeros, and the function of the padded
        rows and their probabilities.
    """
    running = collections.deque()

    def fetch():
        rows, result = running.popleft()
        buffer.data[rows] = np.asarray(result)[: len(rows)]

    for rows, size, function in pieces:
        x_ND = jnp.asarray(buffers.read_rows(buffer.data, rows, size))
        prob_N = jnp.asarray(buffers.read_rows(routes.prob, rows, size))
        result = function(x_ND, prob_N)
        result.copy_to_host_async()
        running.append((rows, result))
        if len(running) > _RUNNING:
            fetch()
    while running:
        fetch()


def expert_kernels(stacked: Mapping[str, Float[Array, "E _ _"]], place: int) -> Kernels:
    """One expert of a group on the device."""
    return _index(dict(stacked), jnp.int32(place))


def chunks(
    rows: Int[np.ndarray, " N"], chunk: int, tail: int
) -> Iterator[tuple[Int[np.ndarray, " n"], int]]:
    """Cuts rows into pieces of `chunk`, the rest into pieces of `tail`; each with its full size."""
    whole = len(rows) // chunk * chunk
    for start in range(0, whole, chunk):
        yield rows[start : start + chunk], chunk
    for start in range(whole, len(rows), tail):
        yield rows[start : start + tail], tail


@jax.jit
def _index(stacked, place):
    return {
        name: jax.lax.dynamic_index_in_dim(array, place, keepdims=False)
        for name, array in stacked.items()
    }


class _Layer(NamedTuple):
    """What a compiled step depends on: blocks of both stacks share it."""

    activations: tuple[str, ...]
    dtype: DTypeLike


@functools.partial(jax.jit, static_argnums=(1, 2), donate_argnums=0)
def _add_load(hessians, layer: _Layer, tile: int, scale_D, kernels: Kernels, x_ND, tiles, place):
    """Adds `tiles` tiles of a load to one expert's part, which is put back once: it is large."""

    def add(index, sums):
        rows_ND = jax.lax.dynamic_slice_in_dim(x_ND, index * tile, tile)
        inputs_ND = rms_norm(rows_ND, scale_D, layer.dtype)
        added = {}
        if "in" in sums:
            added["in"] = hessian.add_tile(sums["in"], inputs_ND)
        if "out" in sums:
            projections = [
                matmul(inputs_ND, kernels[name].astype(inputs_ND.dtype))
                for name in input_matrices(layer.activations)
            ]
            hidden_NF = activate(layer.activations, projections)
            added["out"] = hessian.add_tile(sums["out"], hidden_NF)
        return added

    sums = {kind: hessian.strips(H_ECC, place) for kind, H_ECC in hessians.items()}
    sums = jax.lax.fori_loop(0, tiles, add, sums)
    return {kind: hessian.with_strips(H_ECC, sums[kind], place) for kind, H_ECC in hessians.items()}


@functools.partial(jax.jit, static_argnums=0)
def _run_chunk(layer: _Layer, scale_D, kernels: Kernels, x_ND, prob_N):
    normed_ND = rms_norm(x_ND, scale_D, layer.dtype)
    return add_output(x_ND, expert_mlp(layer.activations, kernels, normed_ND), prob_N)


def add_output(
    x_ND: Float[Array, "N D"], y_ND: Float[Array, "N D"], prob_N: Float[Array, " N"]
) -> Float[Array, "N D"]:
    """The residual stream `x_ND` and, times their probabilities, the experts' outputs."""
    y_ND = prob_N[:, None] * y_ND.astype(jnp.float32)
    return add_residual(x_ND, y_ND).astype(x_ND.dtype)
