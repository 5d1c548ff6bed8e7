# SPDX-License-Identifier: Apache-2.0
"""What a machine has: detected, or as it is described."""

import dataclasses
import os
import pathlib
import shutil

from qmoe_jax.runs import devices

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


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
    """The machine at hand.

    Raises:
      ValueError: it has not so many devices.
    """
    chosen = devices.chosen(num_devices)
    stats = chosen[0].memory_stats() or {}
    return Machine(
        device=chosen[0].device_kind,
        num_devices=len(chosen),
        device_memory=stats.get("bytes_limit"),
        host_memory=host_memory(),
        output_disk=free_disk(output_dir),
        buffer_disk=free_disk(buffer_dir),
        scratch_disk=free_disk(scratch_dir),
    )


def host_memory() -> int | None:
    """Of this machine, or of the container that this process is in."""
    found = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in CGROUP_LIMITS:
        try:
            found.append(int(pathlib.Path(name).read_text()))  # "max": none
        except (OSError, ValueError):
            continue
    return min(found, default=None)


def free_disk(folder: str | None) -> int | None:
    """Where a folder is, or will be made."""
    if folder is None:
        return None
    path = pathlib.Path(folder).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free
