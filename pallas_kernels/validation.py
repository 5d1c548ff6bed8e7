# SPDX-License-Identifier: Apache-2.0
"""What kernels rely on in packed experts, checked."""

from types import ModuleType

import numpy as np
from jaxtyping import UInt32

from pallas_kernels import dictionary_words, tunstall_words
from pallas_kernels import packed as packed_lib
from pallas_kernels.packed import BLOCK_WORDS, HostOrDevice, PackedExperts

_WORDS = {"qmoe": dictionary_words, "tunstall": tunstall_words}


def words_of(codec: str) -> ModuleType:
    """The module of a codec's words: `dictionary_words` or `tunstall_words`.

    Raises:
      ValueError: there is no such codec of ternary experts.
    """
    if codec not in _WORDS:
        raise ValueError(f"`packed` is of codec {codec!r}, expected one of {sorted(_WORDS)}")
    return _WORDS[codec]


def validate(packed: PackedExperts, entries: UInt32[np.ndarray, " entries"]) -> None:
    """Checks on the host what every kernel relies on; a record that passes is read in bounds.

    Sizes agree with `shape`; experts lie in order inside their slab; the words of every row expand
    to its columns as their codec has it (`check_rows` of its words); values are finite.

    Args:
      packed: the record; `codes` may be a memory map.
      entries: the run-time table of its codec (`codec.packing.entries`).

    Raises:
      ValueError: naming the first expert (and row) at fault.
    """
    host = packed_lib.to_host(packed)
    words = words_of(host.codec)
    _check_sizes(host)
    _check_bases(host)
    finite = np.isfinite(np.asarray(host.row_values, np.float32)).all(axis=2)
    if not finite.all():
        expert, row = np.argwhere(~finite)[0]
        raise ValueError(f"`row_values` of expert {expert}, row {row} are not finite")
    tables = _tables(host, entries)
    for expert in range(host.shape[0]):
        starts = np.asarray(host.row_starts[expert], np.int64)
        if starts[0] or (np.diff(starts) < 0).any():
            row = 0 if starts[0] else int(np.argmax(np.diff(starts) < 0))
            raise ValueError(
                f"`row_starts` of expert {expert}, row {row}: must begin at 0 and rise,"
                f" got {starts[row]} and {starts[row + 1]}"
            )
        own, table = packed_lib.expert_words(host, expert), tables[expert]
        try:
            words.check_rows(own, starts, host.shape[2], table)
        except ValueError as error:
            raise ValueError(f"expert {expert}, {error}") from None
        if host.sign_starts is not None:
            nonzeros = tunstall_words.row_nonzeros(own, starts, table)
            expected = tunstall_words.sign_starts(nonzeros[None], starts[-1:])[0]
            if (wrong := np.flatnonzero(np.asarray(host.sign_starts[expert]) != expected)).size:
                row = wrong[0]
                raise ValueError(
                    f"`sign_starts` of expert {expert}, row {row}: {host.sign_starts[expert][row]}"
                    f" is not where its signs begin, {expected[row]}"
                )


def check_kernel_operands(packed: PackedExperts, entries: UInt32[HostOrDevice, " entries"]) -> None:
    """Checks what a traced program can know of a record and its table; see `validate` for the rest.

    Raises:
      ValueError: several slabs, a table of another codec's size, or arrays of other sizes.
    """
    if packed.codes.shape[0] != 1:
        raise ValueError(
            f"`packed` has {packed.codes.shape[0]} slabs; expected one: call it inside `shard_map`"
            " on `local_view(packed)`, or join the groups into one slab"
        )
    size = words_of(packed.codec).TABLE_SIZE
    if entries.shape != (size,) or entries.dtype != np.uint32:
        raise ValueError(
            f"`entries` of codec {packed.codec!r} must be uint32 [{size}], got {entries.dtype}"
            f" {entries.shape}"
        )
    _check_sizes(packed)


def _tables(host: PackedExperts, entries: np.ndarray) -> list[np.ndarray]:
    """The table of each expert."""
    if host.trees is None:
        return [entries] * host.shape[0]
    trees = entries.reshape(-1, tunstall_words.WORDS)
    if (wrong := np.flatnonzero(np.asarray(host.trees) >= len(trees))).size:
        expert = wrong[0]
        raise ValueError(
            f"`trees` of expert {expert} is {host.trees[expert]}, expected less than {len(trees)}"
        )
    return [trees[tree] for tree in np.asarray(host.trees)]


def _check_sizes(host: PackedExperts) -> None:
    experts, rows, _ = host.shape
    if min(host.shape) < 1:
        raise ValueError(f"`shape` must be positive, got {host.shape}")
    expected = {
        "expert_bases": ("uint32", (experts,)),
        "row_starts": ("uint32", (experts, rows + 1)),
        "row_values": ("bfloat16", (experts, rows, 2)),
    }
    if words_of(host.codec) is tunstall_words:
        expected |= {"trees": ("uint8", (experts,)), "sign_starts": ("uint32", (experts, rows + 1))}
    elif host.trees is not None or host.sign_starts is not None:
        raise ValueError(f"codec {host.codec!r} has neither `trees` nor `sign_starts`")
    for name, kind in expected.items():
        array = getattr(host, name)
        got = None if array is None else (array.dtype.name, array.shape)
        if got != kind:
            raise ValueError(f"`{name}` of {host.shape} experts must be {kind}, got {got}")
    slabs, words = host.codes.shape if host.codes.ndim == 2 else (0, 0)
    if slabs < 1 or experts % slabs or words % BLOCK_WORDS or not words:
        raise ValueError(
            f"`codes` must be slabs that divide {experts} experts, of a multiple of {BLOCK_WORDS}"
            f" words; got {host.codes.shape}"
        )


def _check_bases(host: PackedExperts) -> None:
    slabs, slab_words = host.codes.shape
    first = np.asarray(host.expert_bases, np.int64).reshape(slabs, -1) * BLOCK_WORDS
    last = first + packed_lib.expert_sizes(host).reshape(slabs, -1)
    limit = np.concatenate([first[:, 1:], np.full((slabs, 1), slab_words)], axis=1)
    if (wrong := np.flatnonzero(last > limit)).size:
        expert = wrong[0]
        raise ValueError(
            f"expert {expert} ends at word {last.flat[expert]} of its slab, past the next expert's"
            f" first word or the slab's end, {limit.flat[expert]}"
        )
