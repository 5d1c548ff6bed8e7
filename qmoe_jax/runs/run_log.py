# SPDX-License-Identifier: Apache-2.0
"""The log of an unfinished run: the records that it is made of, as JSON lines and back.

The first line is what the run is, `{"run": identity}`; each other one an attempt, a group of
experts or a finished block.
"""

import dataclasses
import json
import pathlib
from typing import Any

from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.checkpoints.packed_manifest import PackedCheckpoint
from qmoe_jax.models.config import STACKS, Stack
from qmoe_jax.report import LayerRecord, MatrixRecord
from qmoe_jax.runs.groups import SolvedGroup
from qmoe_jax.runs.snapshots import Snapshot


@dataclasses.dataclass(frozen=True)
class FinishedBlock:
    """A block whose experts and parameters are committed, and what comes out of it."""

    stack: Stack
    layer: int
    record: LayerRecord | None  # of a sparse block
    snapshots: dict[str, Snapshot]  # by track: the next block's input
    seconds: dict[str, float]  # by phase, of the run so far

    @property
    def place(self) -> tuple[int, int]:
        """In the order of the walk."""
        return STACKS.index(self.stack), self.layer


@dataclasses.dataclass(frozen=True)
class Earlier:
    """What earlier attempts left; of a new run, nothing but the store's header."""

    store: PackedCheckpoint  # what is committed
    groups: dict[tuple[str, int, int], SolvedGroup]  # (stack, layer, first expert)
    blocks: list[FinishedBlock]  # in order
    attempts: int

    @property
    def seconds(self) -> dict[str, float]:
        """Of the attempts before, up to the newest block."""
        return dict(self.blocks[-1].seconds) if self.blocks else {}

    def newest(self, stack: Stack) -> FinishedBlock | None:
        """The last finished block of a stack."""
        return next((block for block in reversed(self.blocks) if block.stack == stack), None)

    @property
    def layers(self) -> list[LayerRecord]:
        """Of the finished sparse blocks."""
        return [block.record for block in self.blocks if block.record is not None]


def group_record(stack: Stack, layer: int, solved: SolvedGroup) -> dict[str, Any]:
    """What is kept of a group beside its weights, as JSON values."""
    record = dataclasses.asdict(dataclasses.replace(solved, packed={}))
    return {"stack": stack, "layer": layer, "group": record}


def solved_group(record: dict[str, Any]) -> SolvedGroup:
    """The inverse of `group_record`."""
    value = record["group"]
    return SolvedGroup(**{**value, "matrices": _matrices(value)})


def lines(file: pathlib.Path) -> list[dict[str, Any]]:
    """All lines as JSON values, but for one that was cut off; the first says what the run is.

    Raises:
      CheckpointError: it is damaged.
    """
    try:
        whole, _, _ = file.read_bytes().rpartition(b"\n")
        found = [json.loads(line) for line in whole.splitlines()]
        if not isinstance(found[0]["run"], dict):
            raise ValueError("its first line is not what it should be")
        return found
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise damaged(file, error) from error


def damaged(file: pathlib.Path, error: Exception) -> CheckpointError:
    """What to raise where a file of an unfinished run is not what it should be."""
    return CheckpointError(
        f"{file} is damaged ({error}): this compression cannot go on; remove {file.parents[1]} and "
        "start it again"
    )


def read(file: pathlib.Path, store: PackedCheckpoint) -> Earlier:
    """What earlier attempts left.

    Args:
      file: the log.
      store: what is committed.

    Raises:
      CheckpointError: the log is damaged, or lacks the record of a committed group.
    """
    groups, blocks, attempts = {}, [], 0
    try:
        for line in lines(file):
            if "group" in line:
                solved = solved_group(line)
                groups[line["stack"], line["layer"], solved.start] = solved
            elif "block" in line:
                block = _finished_block(line["block"], file.parent.absolute())
                # One that was walked again takes back all that came after it.
                blocks = [*(b for b in blocks if b.place < block.place), block]
            attempts = line.get("attempt", attempts)
        committed = {(*place, group.start) for place, of in store.groups.items() for group in of}
        if missing := committed - groups.keys():
            raise ValueError(f"no record of {min(missing)}")
    except (ValueError, LookupError, TypeError) as error:
        raise damaged(file, error) from error
    return Earlier(store, {key: groups[key] for key in committed}, blocks, attempts)


def _finished_block(value: dict[str, Any], folder: pathlib.Path) -> FinishedBlock:
    record = value["record"]
    if record is not None:
        record = LayerRecord(**{**record, "matrices": _matrices(record)})
    snapshots = {
        track: Snapshot(**{**taken, "file": str(folder / taken["file"])})
        for track, taken in value["snapshots"].items()
    }
    return FinishedBlock(**{**value, "record": record, "snapshots": snapshots})


def _matrices(value: dict[str, Any]) -> dict[str, MatrixRecord]:
    return {name: MatrixRecord(**matrix) for name, matrix in value["matrices"].items()}
