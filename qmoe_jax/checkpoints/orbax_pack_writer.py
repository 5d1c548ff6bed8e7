# SPDX-License-Identifier: Apache-2.0
"""Writes a packed store as a standard Orbax checkpoint; `orbax_pack.py` says what is in it.

Orbax takes a tree whose arrays are all in memory; here an array is loaded when Orbax comes to it.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict
from jaxtyping import Shaped

from qmoe_jax.checkpoints import (
    array_files,
    kvstore,
    orbax_logging,
    orbax_pack,
    packed,
    packed_arrays,
)
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.checkpoints.packed_manifest import PackedCheckpoint
from qmoe_jax.models import config as configs
from qmoe_jax.models.config import Stack

_BATCH_BYTES = 128 << 20  # of arrays that are written together
_QUIET_SECONDS = 0.3  # without a change in a folder: nobody is writing
_MAX_SLABS = 64  # devices that may share a matrix; more slabs would be more padding


def save(
    folder: str | os.PathLike[str],
    store: PackedCheckpoint,
    *,
    written: Callable[[str, int], None] = lambda name, nbytes: None,
) -> pathlib.Path:
    """Writes a packed store as an Orbax checkpoint; all of it or nothing.

    Memory holds the packed experts of one layer, as read and as stacked, and of what Orbax writes
    at a time, 128 MiB or one array, twice more.

    Args:
      folder: a local folder that does not exist yet.
      store: from `packed.open_checkpoint`.
      written: called with name and bytes of each array when it is written.

    Returns:
      The folder.

    Raises:
      CheckpointError: the folder exists or cannot be written; the store is damaged, or its groups
        cannot be stacked.
    """
    manifest = json.loads((store.path / packed.MANIFEST).read_bytes())
    custom = orbax_pack.custom_metadata(store, manifest)
    registry = ocp.type_handlers.create_type_handler_registry(
        (_Unread, _LoadingHandler(written)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # there is none; without, Orbax warns
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=True, use_zarr3=False, type_handler_registry=registry
    )
    args = ocp.args.PyTreeSave(unflatten_dict(_unread(store), sep="/"))
    with array_files.new_folder(folder) as temporary:
        inner = temporary / "orbax"  # so that what Orbax leaves of it is below our folder
        try:
            with orbax_logging.silenced(), ocp.Checkpointer(handler) as checkpointer:
                checkpointer.save(inner, args=args, custom_metadata=custom)
        except CheckpointError:
            raise
        except kvstore.FAILURES as error:
            _settle(temporary)
            raise CheckpointError(
                f"cannot write {folder}: {kvstore.reason(error)}. Free space on that disk, or "
                "choose another folder."
            ) from error
        for path in inner.iterdir():
            path.rename(temporary / path.name)
        inner.rmdir()
    return pathlib.Path(folder).absolute()


def slabs(experts: int) -> int:
    """How many equal slabs the words of so many experts are laid out in.

    Each count of devices that divides it can share them.
    """
    return max(n for n in range(1, min(experts, _MAX_SLABS) + 1) if experts % n == 0)


def _settle(folder: pathlib.Path) -> None:
    """Waits for what TensorStore is still writing: it would make the folder again."""
    before, now = None, _files(folder)
    while now != before:
        time.sleep(_QUIET_SECONDS)
        before, now = now, _files(folder)


def _files(folder: pathlib.Path) -> list[tuple[str, int]]:
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # renamed meanwhile
            found.append((str(path), path.stat().st_size))
    return sorted(found)


@dataclasses.dataclass(frozen=True)
class _Unread:
    """A leaf that is loaded when Orbax writes it."""

    load: Callable[[], np.ndarray]
    is_cut: bool  # into chunks along axis 0, so that a device reads its own


class _LoadingHandler(ocp.type_handlers.NumpyHandler):
    """Writes NumPy arrays, which is how Orbax restores them, a few at a time."""

    def __init__(self, written: Callable[[str, int], None]):
        super().__init__()
        self._written = written

    async def serialize(self, values: Any, infos, args=None):
        del args
        batch: list[tuple[np.ndarray, Any, ocp.SaveArgs]] = []
        for value, info in zip(values, infos, strict=True):
            array = value.load()
            if batch and sum(held.nbytes for held, *_ in batch) + array.nbytes > _BATCH_BYTES:
                await self._write(batch)
            batch.append((array, info, _save_args(array, value.is_cut)))
        await self._write(batch)
        return []

    async def _write(self, batch: list[tuple[np.ndarray, Any, ocp.SaveArgs]]) -> None:
        """Several arrays at once: each commit writes the store's whole index again."""
        serialize = super().serialize
        begun = [serialize([array], [info], [args]) for array, info, args in batch]
        # All have ended when the first failure is raised: none goes on without its event loop.
        for futures in await asyncio.gather(*begun, return_exceptions=True):
            if isinstance(futures, BaseException):
                raise futures
            for future in futures:
                future.result()
        for array, info, _ in batch:
            self._written(info.name, array.nbytes)
        batch.clear()

    def memory_size(self, values):
        return [(0, 0) for _ in values]  # for Orbax's log; they are not in memory


def _save_args(array: np.ndarray, is_cut: bool) -> ocp.SaveArgs:
    if not is_cut or array.ndim < 2:
        return ocp.SaveArgs()
    # Orbax before 0.11.30 heeds the axes only where there is a size.
    return ocp.SaveArgs(chunk_byte_size=array.nbytes // array.shape[0], shard_axes=(0,))


def _unread(store: PackedCheckpoint) -> dict[str, _Unread]:
    """All leaves by their paths; those of one layer share what is read of it."""

    def param(name: str) -> Shaped[np.ndarray, "..."]:
        return packed.read_params(store, [name])[name]

    held: dict[str, dict[str, np.ndarray]] = {}  # of one layer

    def expert_array(prefix: str, part: str) -> Shaped[np.ndarray, "..."]:
        if prefix not in held:
            held.clear()
            held[prefix] = dict(_stacked(store, *places[prefix]))
        return held[prefix][part]

    places: dict[str, tuple[Stack, int]] = {
        f"{stack}/layers_{layer}/mlp/expert/": (stack, layer)
        for stack, layer in configs.sparse_places(store.header.config)
    }
    found = {}
    for path in orbax_pack.leaves(store):
        prefix = next((prefix for prefix in places if path.startswith(prefix)), None)
        if prefix is None:
            found[path] = _Unread(functools.partial(param, path), is_cut=False)
        else:
            part = path.removeprefix(prefix)
            found[path] = _Unread(functools.partial(expert_array, prefix, part), is_cut=True)
    return found


def _stacked(
    store: PackedCheckpoint, stack: Stack, layer: int
) -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
    """The arrays of all experts of a layer, by matrix and part: `wi/codes`."""
    if (codec := store.header.codec) in orbax_pack.PACKED_PARTS:
        count = slabs(store.header.config.num_experts)
        for matrix, record in packed.load_experts(store, stack, layer, count).items():
            for part in orbax_pack.PACKED_PARTS[codec]:
                yield f"{matrix}/{part}", np.asarray(getattr(record, part))
        return
    groups = [experts for _, experts in packed.read_groups(store, stack, layer)]
    for matrix in configs.expert_matrices(store.header.config):
        arrays = [packed_arrays.to_arrays(experts[matrix]) for experts in groups]
        for part in arrays[0]:
            yield f"{matrix}/{part}", np.concatenate([group[part] for group in arrays])
