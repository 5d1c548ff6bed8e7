# SPDX-License-Identifier: Apache-2.0
"""The tokens routed to one expert, in fixed-size chunks: Hessians of its matrices, and its output.

An expert's tokens are taken in buffer order, in chunks of `CHUNK` rows and, for the rest, of `TAIL`
rows, the last one padded with zeros. So two shapes are compiled, and what an expert gets does not
depend on which other experts are in its group.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qmoe_jax.calibration import buffers
from qmoe_jax.calibration.buffers import TokenBuffer
from qmoe_jax.calibration.walk import Params, Routes
from qmoe_jax.models.block import Block
from qmoe_jax.models.config import SwitchConfig, input_matrices
from qmoe_jax.models.layers import activate, add_residual, matmul, rms_norm
from qmoe_jax.models.moe import expert_mlp
from qmoe_jax.quantization import hessian

CHUNK = 512
TAIL = 128
_RUNNING = 4  # chunks on the device whose results have not been fetched

# One expert's matrices, [in, out], by name.
Kernels = Mapping[str, Float[Array, "_ _"]]


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
    starts = np.searchsorted(np.sort(expert), np.arange(num_experts + 1))
    return Assignment(np.argsort(expert, kind="stable")[: starts[-1]], starts)


def token_cap(assignment: Assignment, factor: float) -> int:
    """Most tokens of one expert that its Hessian counts: `factor` times the mean over experts."""
    return math.ceil(factor * len(assignment.rows) / (len(assignment.starts) - 1))


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
    scale_D = layer_params["pre_mlp_layer_norm"]["scale"]
    for chunk, size in _chunks(rows):
        x_ND = jnp.asarray(buffers.read_rows(buffer.data, chunk, size))
        hessians = _add_chunk(hessians, block, scale_D, kernels, x_ND, jnp.int32(place))
    return hessians


def run_expert(
    block: Block,
    layer_params: Params,
    kernels: Kernels,
    buffer: TokenBuffer,
    routes: Routes,
    rows: Int[np.ndarray, " N"],
) -> None:
    """Adds `prob * expert(norm(x))` to the expert's rows of `buffer`, in place."""
    scale_D = layer_params["pre_mlp_layer_norm"]["scale"]
    running = collections.deque()

    def fetch():
        chunk, result = running.popleft()
        buffer.data[chunk] = np.asarray(result)[: len(chunk)]

    for chunk, size in _chunks(rows):
        x_ND = jnp.asarray(buffers.read_rows(buffer.data, chunk, size))
        prob_N = jnp.asarray(buffers.read_rows(routes.prob, chunk, size))
        running.append((chunk, _run_chunk(block, scale_D, kernels, x_ND, prob_N)))
        if len(running) > _RUNNING:
            fetch()
    while running:
        fetch()


def expert_kernels(stacked: Mapping[str, Float[Array, "E _ _"]], place: int) -> Kernels:
    """One expert of a group on the device."""
    return _index(dict(stacked), jnp.int32(place))


def _chunks(rows: Int[np.ndarray, " N"]) -> Iterator[tuple[Int[np.ndarray, " n"], int]]:
    whole = len(rows) // CHUNK * CHUNK
    for start in range(0, whole, CHUNK):
        yield rows[start : start + CHUNK], CHUNK
    for start in range(whole, len(rows), TAIL):
        yield rows[start : start + TAIL], TAIL


@jax.jit
def _index(stacked, place):
    return {
        name: jax.lax.dynamic_index_in_dim(array, place, keepdims=False)
        for name, array in stacked.items()
    }


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def _add_chunk(hessians, block: Block, scale_D, kernels: Kernels, x_ND, place):
    x_ND = rms_norm(x_ND, scale_D, block.dtype)
    added = {}
    if "in" in hessians:
        added["in"] = hessian.add_tokens(hessians["in"], x_ND, place)
    if "out" in hessians:
        activations = block.config.mlp_activations
        projections = [
            matmul(x_ND, kernels[name].astype(x_ND.dtype)) for name in input_matrices(activations)
        ]
        hidden_NF = activate(activations, projections)
        added["out"] = hessian.add_tokens(hessians["out"], hidden_NF, place)
    return added


@functools.partial(jax.jit, static_argnums=0)
def _run_chunk(block: Block, scale_D, kernels: Kernels, x_ND, prob_N):
    normed_ND = rms_norm(x_ND, scale_D, block.dtype)
    y_ND = expert_mlp(block.config.mlp_activations, kernels, normed_ND)
    y_ND = prob_N[:, None] * y_ND.astype(jnp.float32)
    return add_residual(x_ND, y_ND).astype(x_ND.dtype)
