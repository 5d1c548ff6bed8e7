# SPDX-License-Identifier: Apache-2.0
"""What reading experts costs where the chunks of a checkpoint span many of them.

    python benchmarks/chunk_layouts.py

The layouts are those that T5X chooses for the released models when one host writes whole arrays,
each axis of array and chunk scaled down alike, then that of an expert-sharded mesh, and ours.
`groups` reads through `t5x_experts.expert_groups`, 16 experts at a time, `scratch` the same with
too little memory for a block of experts, `loop` 16 experts one after another as `array[e]`. Each
reading has a process of its own. Decompressed bytes are TensorStore's own count of chunks read
times the size of a chunk; MB/s are of what was asked for. The files are in the page cache.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import rich.console
import rich.table
import tensorstore as ts

from qmoe_jax.checkpoints import t5x, t5x_experts, t5x_msgpack
from qmoe_jax.runs import devices

NAME = "encoder/layers_1/mlp/expert/wi/kernel"
GROUP = 16  # experts
PLENTY, SCARCE = 4 << 30, 1 << 20  # bytes of memory for kept blocks
GZIP, ZSTD = {"id": "gzip", "level": 1}, {"id": "zstd", "level": 1}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A stack of experts, its chunks, and by how much expert and matrix axes are scaled down."""

    shape: tuple[int, int, int]
    chunks: tuple[int, int, int]
    compressor: dict[str, Any]
    scaled: str


LAYOUTS = {
    "base-8": Layout((8, 768, 3072), (8, 768, 1536), GZIP, "1, 1, 1"),
    "base-128": Layout((128, 192, 768), (128, 64, 96), GZIP, "1, 4, 4"),
    "large-128": Layout((128, 256, 1024), (128, 64, 128), GZIP, "1, 4, 4"),
    "xxl-128": Layout((128, 256, 640), (128, 16, 32), GZIP, "1, 16, 16"),
    "c-2048": Layout((512, 130, 384), (64, 13, 16), GZIP, "4, 16, 16"),
    "mesh of 8 x 4": Layout((128, 192, 768), (16, 192, 192), ZSTD, "1, 4, 4"),
    "ours": Layout((128, 192, 768), (1, 192, 768), GZIP, "1, 4, 4"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Reading experts from chunks of all shapes")
    parser.add_argument("--read", nargs=2, metavar=("FOLDER", "WAY"), help="one reading, as JSON")
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(measure(arguments.read[0], arguments.read[1])))
        return
    table = rich.table.Table(
        *("layout", "array", "chunk", "read by", "cores", "decompressed / needed", "MB/s"),
        *("peak memory MB", "scratch MB"),
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, layout in LAYOUTS.items():
            path = write(pathlib.Path(folder, name.replace(" ", "_")), layout)
            for way, cores in (("groups", 2), ("groups", 1), ("scratch", 2), ("loop", 2)):
                found = in_own_process(path, way, cores)
                table.add_row(
                    name,
                    " x ".join(map(str, layout.shape)),
                    " x ".join(map(str, layout.chunks)),
                    way,
                    str(cores),
                    f"{found['decompressed']:.2f}",
                    f"{found['rate'] / 1e6:.0f}",
                    f"{found['memory'] / 1e6:.0f}",
                    f"{found['scratch'] / 1e6:.0f}",
                )
            table.add_section()
    rich.console.Console(width=140).print(table)


def write(folder: pathlib.Path, layout: Layout) -> pathlib.Path:
    """A classic T5X checkpoint of one stack of experts, random as weights are."""
    directory = f"target.{NAME.replace('/', '.')}/"
    spec = {
        "driver": "zarr",
        "dtype": "float32",
        "kvstore": {"driver": "file", "path": f"{folder}/{directory}"},
        "metadata": {
            "shape": layout.shape,
            "chunks": layout.chunks,
            "compressor": layout.compressor,
        },
    }
    array = ts.open(spec, create=True).result()
    generator = np.random.default_rng(0)
    step = layout.chunks[0]
    for start in range(0, layout.shape[0], step):
        part = generator.standard_normal((step, *layout.shape[1:]), np.float32)
        array[start : start + step].write(part * np.float32(0.05)).result()
    spec["kvstore"] = {"driver": "file", "path": directory}
    spec["metadata"] = {"shape": list(layout.shape)}
    leaf: dict[str, Any] = spec
    for key in reversed(NAME.split("/")):
        leaf = {key: leaf}
    tree = {"version": 3, "optimizer": {"target": leaf, "state": {}}}
    (folder / "checkpoint").write_bytes(t5x_msgpack.pack(tree))
    return folder


def in_own_process(path: pathlib.Path, way: str, cores: int) -> dict[str, float]:
    every = sorted(os.sched_getaffinity(0))
    command = ["taskset", "-c", ",".join(map(str, every[:cores])), sys.executable, __file__]
    done = subprocess.run(
        [*command, "--read", str(path), way], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(path: str, way: str) -> dict[str, float]:
    """Reads all experts once; bytes decompressed over bytes needed, bytes a second, peak bytes."""
    checkpoint = t5x.open_checkpoint(path)
    shape, chunks = checkpoint.leaves[NAME].shape, t5x.chunk_shape(checkpoint, NAME)
    experts = shape[0]
    before, memory, begun = chunk_reads(), devices.peak_host_bytes(), time.perf_counter()
    if way == "loop":
        array = t5x.open_arrays(checkpoint, [NAME])[NAME]
        experts = min(GROUP, experts)
        for expert in range(experts):
            array[expert].read().result()
    else:
        budget = PLENTY if way == "groups" else SCARCE
        with tempfile.TemporaryDirectory() as scratch:
            for _ in t5x_experts.expert_groups(
                *(checkpoint, [NAME], GROUP),
                memory_budget=budget,
                scratch_dir=pathlib.Path(scratch),
            ):
                pass
    seconds = time.perf_counter() - begun
    scarce = t5x_experts.chunk_room(checkpoint, [NAME], SCARCE).scratch
    needed = 4 * experts * math.prod(shape[1:])
    return {
        "decompressed": (chunk_reads() - before) * 4 * math.prod(chunks) / needed,
        "rate": needed / seconds,
        "memory": devices.peak_host_bytes() - memory,
        "scratch": scarce if way == "scratch" else 0,
    }


def chunk_reads() -> int:
    """Chunks that TensorStore has read and decompressed in this process."""
    name = "/tensorstore/cache/chunk_cache/reads"
    metrics = ts.experimental_collect_matching_metrics(name)
    return sum(metric["values"][0]["value"] for metric in metrics)


if __name__ == "__main__":
    main()
