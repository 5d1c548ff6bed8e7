# SPDX-License-Identifier: Apache-2.0
"""What a machine has: detected, or as it is described."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping

from qmoe_jax.runs import devices

CGROUPS = "/sys/fs/cgroup"
OWN_CGROUPS = "/proc/self/cgroup"


@dataclasses.dataclass(frozen=True)
class Machine:
    """Bytes; None where it is not known."""

    device: str
    num_devices: int
    device_memory: int | None  # of one device, as far as JAX may take it
    host_memory: int | None
    output_disk: int | None
    buffer_disk: int | None = None
    scratch_disk: int | None = None
    # Of OUTPUT_DIR, BUFFER_DIR and SCRATCH_DIR: those of one number are on one disk.
    disks: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def shared_memory(self) -> bool:
        """Whether device and host have the same memory."""
        return self.device_memory is None


def detect(
    num_devices: int | None,
    output_dir: str | None,
    buffer_dir: str | None = None,
    scratch_dir: str | None = None,
) -> Machine:
    """The machine at hand; buffers and scratch files that have no folder are to be at the output.

    Raises:
      ValueError: it has not so many devices.
    """
    chosen = devices.chosen(num_devices)
    stats = chosen[0].memory_stats() or {}
    output_dir = output_dir or "."
    buffer_dir, scratch_dir = buffer_dir or output_dir, scratch_dir or output_dir
    folders = {"OUTPUT_DIR": output_dir, "BUFFER_DIR": buffer_dir, "SCRATCH_DIR": scratch_dir}
    return Machine(
        device=chosen[0].device_kind,
        num_devices=len(chosen),
        device_memory=stats.get("bytes_limit"),
        host_memory=host_memory(),
        output_disk=free_disk(output_dir),
        buffer_disk=free_disk(buffer_dir),
        scratch_disk=free_disk(scratch_dir),
        disks={name: existing(folder).stat().st_dev for name, folder in folders.items()},
    )


def host_memory() -> int | None:
    """Of this machine, or of the container that this process is in."""
    found = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file in _memory_limits():
        with contextlib.suppress(OSError, ValueError):
            found.append(int(file.read_text()))  # "max": none
    return min(found, default=None)


def _memory_limits() -> Iterator[pathlib.Path]:
    """Files that may limit this process: of its control group, and of those around it."""
    try:
        lines = pathlib.Path(OWN_CGROUPS).read_text().splitlines()
    except OSError:
        lines = ["0::/", "0:memory:/"]
    for line in lines:
        _, kinds, group = line.split(":", 2)
        if kinds == "":  # version 2
            top, name = pathlib.Path(CGROUPS), "memory.max"
        elif "memory" in kinds.split(","):
            top, name = pathlib.Path(CGROUPS, "memory"), "memory.limit_in_bytes"
        else:
            continue
        own = pathlib.PurePosixPath(group.lstrip("/"))
        yield from (top / part / name for part in (own, *own.parents))


def free_disk(folder: str) -> int:
    """Where a folder is, or will be made."""
    return shutil.disk_usage(existing(folder)).free


def existing(folder: str) -> pathlib.Path:
    """The folder, or the nearest one above that is there already."""
    path = pathlib.Path(folder).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
