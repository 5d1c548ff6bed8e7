# SPDX-License-Identifier: Apache-2.0
"""What the machine at hand can hold and compute in."""

import ctypes
import hashlib
import os
import pathlib
import platform
import re
import resource
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qmoe_jax.models.config import SwitchConfig, expert_matrices
from qmoe_jax.quantization.gptq import GridFit

CPU_GROUP_BYTES = 2 << 30  # host memory that one group of experts may take on a CPU
DEVICE_SHARE = 0.5  # of an accelerator's memory
KEPT_BYTES = 1 << 30  # the largest piece of memory that malloc keeps when it is freed
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # glibc: mallopt(3)
KEPT_COMPILE_SECONDS = 0.1  # programs that took less are not worth a file
CPU_BATCH_TOKENS, BATCH_TOKENS = 1024, 8192  # a CPU is fastest on what stays in its caches


def chosen(number: int | None) -> list[Any]:
    """The first devices of this process; None: all.

    Raises:
      ValueError: there are not so many.
    """
    found = jax.local_devices()
    if number is not None and not 1 <= number <= len(found):
        raise ValueError(f"NUM_DEVICES is {number}; expected 1 to {len(found)}, which are there")
    return found[:number]


def join_processes(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Makes this process one of several; to be called before JAX is used. None: detected.

    Raises:
      ValueError: they are not found, or not all given.
    """
    try:
        jax.distributed.initialize(coordinator, count, index)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"--multiprocess_gpu: the processes do not find each other ({error}); give "
            "--coordinator_address=HOST:PORT, --process_count and --process_index to each"
        ) from error


def batch_tokens(wanted: int | None, accelerator: bool | None = None) -> int:
    """Padded positions in a batch of the dense part: `wanted`, or what suits the device at hand.

    `accelerator` says of a described device whether it is one.
    """
    if wanted is not None:
        return wanted
    if accelerator is None:
        accelerator = jax.devices()[0].platform != "cpu"
    return BATCH_TOKENS if accelerator else CPU_BATCH_TOKENS


def experts_per_group(
    config: SwitchConfig,
    wanted: int | None,
    num_devices: int = 1,
    memory: int | None = None,
    grid: GridFit = "minmax",
) -> int:
    """How many experts a device solves together: `wanted`, or about what fits, a share at most.

    `memory` is a described device's; None: that of the one at hand. `grid` is the quantizer's.

    Raises:
      ValueError: fewer than one wanted.
    """
    if wanted is not None:
        if wanted < 1:
            raise ValueError(f"EXPERTS_PER_GROUP is {wanted}; expected 1 or more")
        return min(wanted, config.num_experts)
    experts = config.num_experts
    in_memory = max(1, _group_budget(memory) // group_bytes(config, grid))
    fitting = min(-(-experts // num_devices), in_memory)
    # A last group of another size would compile all programs again.
    equal = max(size for size in range(1, fitting + 1) if experts % size == 0)
    return equal if 2 * equal >= fitting else fitting


def group_bytes(config: SwitchConfig, grid: GridFit = "minmax") -> int:
    """Device memory for one expert of a group while it is solved, about."""
    D, F = config.emb_dim, config.expert_mlp_dim
    weights = D * F * len(expert_matrices(config))
    kept = 13 * weights + 4 * (D * D + F * F)  # original, compressed, nearest, levels; Hessians
    kept += 11 * weights  # of the group before, which is being packed: compressed, levels, words
    kept += 4 * weights  # of the group after, which is on its way
    # Of the matrix being solved: W, W - Q, Q and the products; H in order, L, M, scaled M.
    matrices = 16 if grid == "minmax" else 40  # H W, levels, where they are 1 and 2, H times these
    return kept + matrices * D * F + 16 * max(D, F) ** 2


def keep_freed_memory() -> None:
    """Lets malloc keep what one batch frees for the next; to be called before JAX starts threads.

    glibc would give large pieces back, and the kernel would zero them again, page by page: measured
    at a tenth of a compression's time on a CPU. Changes nothing on other systems, nor where the
    environment sets MALLOC_* or GLIBC_TUNABLES itself.
    """
    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if chosen or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)


def keep_compiled_programs() -> None:
    """Lets later runs take the programs that this one compiles, from the user's cache folder.

    To be called before JAX compiles. JAX's own settings (JAX_COMPILATION_CACHE_DIR and its like)
    go first; without a home folder nothing is kept.
    """
    settings = {}
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        try:
            base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        except RuntimeError:
            return
        folder = pathlib.Path(base, "qmoe_jax", "xla", _cpu_fingerprint())
        settings["jax_compilation_cache_dir"] = str(folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        settings["jax_persistent_cache_min_compile_time_secs"] = KEPT_COMPILE_SECONDS
    for name, value in settings.items():
        jax.config.update(name, value)


def _cpu_fingerprint() -> str:
    """Of the instructions that programs may have been compiled to; a home may be on many machines.

    JAX's own keys do not tell CPUs apart.
    """
    known = f"{platform.machine()} {platform.processor()}"
    cpus = pathlib.Path("/proc/cpuinfo")
    if cpus.exists():
        lines = re.findall(r"^(?:flags|Features|model name)\s*:.*", cpus.read_text(), re.MULTILINE)
        known += "".join(sorted(set(lines)))
    return hashlib.sha256(known.encode()).hexdigest()[:16]


def peak_host_bytes() -> int:
    """The most resident memory that this process has had."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # getrusage would begin at the peak of whoever started the process
        (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
        return 1024 * int(kilobytes)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def description() -> str:
    """The device, in words."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"


def _group_budget(memory: int | None) -> int:
    if memory is None:
        memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return CPU_GROUP_BYTES if memory is None else int(memory * DEVICE_SHARE)


def to_device(array: np.ndarray) -> jax.Array:
    """A copy on the device: later writes into `array` do not show."""
    return jnp.array(array, copy=True)


def send_ahead(arrays: dict[str, Any], device: Any) -> None:
    """Begins to copy arrays to an accelerator, in their place; to a CPU's memory, nothing.

    Where the device has no room for them yet they stay as they are.
    """
    if device.platform == "cpu":
        return
    for name in list(arrays):
        try:
            arrays[name] = jax.device_put(arrays[name], device)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return
