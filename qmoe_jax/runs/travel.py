# SPDX-License-Identifier: Apache-2.0
"""Tokens travel to the process of their expert and back; encoder outputs follow their samples.

Samples belong to processes in the dense part, experts in the sparse part. Rows that visit are in
the order of the buffer of all samples, as they would be on one process.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from qmoe_jax.calibration import exchange, walk
from qmoe_jax.calibration.buffers import TokenBuffer
from qmoe_jax.calibration.exchange import Trip
from qmoe_jax.calibration.walk import Activations, Routes
from qmoe_jax.models.config import Stack
from qmoe_jax.runs.processes import Processes


@dataclasses.dataclass(frozen=True)
class Visit:
    """One track's tokens at the process that has their experts."""

    trip: Trip
    order: Int[np.ndarray, " M"]  # that the rows came in -> that of all samples
    rows: Int[np.ndarray, " M"]  # of the buffer of all samples, ascending
    buffer: TokenBuffer
    routes: Routes


def to_experts(processes: Processes, num_experts: int, state: Activations, routes: Routes) -> Visit:
    """Brings one track's tokens, as they are after the dense part, to their experts' processes."""
    bounds = processes.bounds(num_experts)
    destination = np.searchsorted(bounds, routes.expert, side="right")
    trip = exchange.plan(exchange.process_mesh(), destination)
    rows = exchange.send(trip, walk.global_rows(state))
    order = np.argsort(rows, kind="stable")
    arrived = Routes(
        exchange.send(trip, routes.expert)[order], exchange.send(trip, routes.prob)[order]
    )
    data = exchange.send(trip, state.updated.data)[order]
    buffer = TokenBuffer(data, np.asarray([0, len(data)]))
    return Visit(trip, order, rows[order], buffer, arrived)


def home(visit: Visit, state: Activations) -> None:
    """Brings the tokens back, with what their experts made of them."""
    values = np.empty_like(visit.buffer.data)
    values[visit.order] = visit.buffer.data
    exchange.send_back(visit.trip, values, state.updated.data)


def at_experts(state: Activations, visit: Visit) -> Activations:
    """The track's activations with the visiting tokens as those to be updated."""
    return dataclasses.replace(state, updated=visit.buffer)


def follow_samples(
    encoder: Activations, encoded: TokenBuffer, owners: Int[np.ndarray, " samples"], index: int
) -> TokenBuffer:
    """Brings encoder outputs to the processes that have the samples in the decoder's walk.

    Args:
      encoder: the encoder's activations on this process.
      encoded: its outputs.
      owners: process of each sample in the decoder's walk.
      index: this process.
    """
    rows = walk.global_rows(encoder)
    lengths = encoder.samples.encoder_lengths
    sample = np.repeat(np.arange(len(lengths)), lengths)[rows]
    trip = exchange.plan(exchange.process_mesh(), owners[sample])
    order = np.argsort(exchange.send(trip, rows), kind="stable")
    data = exchange.send(trip, encoded.data)[order]
    own = np.where(owners == index, lengths, 0)
    return TokenBuffer(data, np.concatenate([[0], np.cumsum(own)]).astype(np.int64))


def keep_of(
    keep: Mapping[Stack, np.ndarray | None], stack: Stack, visit: Visit | None
) -> np.ndarray | None:
    """Which of the tokens at hand the Hessians count."""
    found = keep[stack]
    return found if found is None or visit is None else found[visit.rows]
