# SPDX-License-Identifier: Apache-2.0
"""The peak of host memory does not grow with the number of experts, however they are chunked.

Each peak is taken in a process of its own, in the second of two equal runs, when nothing is left to
compile, as the kernel's high-water mark, set back in between. `getrusage` would not do: its maximum
cannot be set back, and starts with that of the process that began this one.
"""

import io
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import rich.console
from classic_t5x import write_checkpoint

import qmoe_jax
from qmoe_jax.checkpoints import t5x, t5x_experts
from qmoe_jax.models import config as configs
from qmoe_jax.models.config import SwitchConfig
from qmoe_jax.quantization.quantizer import Quantizer
from qmoe_jax.runs.compress import Compute

FEW, MANY = 8, 72
WIDTH = 512  # of the model and of its experts
ADDED = (MANY - FEW) * 2 * WIDTH * WIDTH * 4  # bytes: 128 MiB
SMALL, PLENTY = 4 << 20, 4 << 30  # read budgets: less than FEW experts of a matrix, and all
EXPERTS = [f"encoder/layers_0/mlp/expert/{name}/kernel" for name in ("wi", "wo")]

# Memory that is freed goes back at once: what malloc keeps for later differs from run to run.
STRICT_MALLOC = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def write_model(directory, num_experts, experts_per_chunk):
    """One sparse layer; chunks are small where they span many experts."""
    config = SwitchConfig(
        vocab_size=512,
        emb_dim=WIDTH,
        num_heads=2,
        head_dim=16,
        mlp_dim=64,
        expert_mlp_dim=WIDTH,
        num_encoder_layers=1,
        num_decoder_layers=1,
        encoder_sparse_layers=(0,),
        decoder_sparse_layers=(),
        num_experts=num_experts,
    )
    rng = np.random.default_rng(0)
    params = {
        # Few values, so that the files are written soon.
        name: rng.integers(-16, 17, shape, np.int8).astype(np.float32) / np.float32(256)
        for name, shape in configs.param_shapes(config).items()
    }
    side = WIDTH if experts_per_chunk == 1 else WIDTH // 8
    write_checkpoint(directory, params, dict.fromkeys(EXPERTS, (experts_per_chunk, side, side)))
    return directory


def peak_of(checkpoint, method, read_budget):
    """Bytes that compressing `checkpoint` takes at most, measured in a fresh process."""
    output = checkpoint.with_name(f"{checkpoint.name}-{method}-{read_budget}")
    arguments = [checkpoint, output, method, read_budget]
    done = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | STRICT_MALLOC,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_one_expert_a_chunk(tmp_path):
    few = write_model(tmp_path / "few", FEW, 1)
    many = write_model(tmp_path / "many", MANY, 1)
    assert peak_of(many, "gptq", SMALL) - peak_of(few, "gptq", SMALL) < ADDED / 4


def test_all_experts_in_every_chunk(tmp_path):
    few = write_model(tmp_path / "few", FEW, FEW)
    many = write_model(tmp_path / "many", MANY, MANY)
    opened = t5x.open_checkpoint(many)
    layer = MANY * 2 * WIDTH * WIDTH * 4
    assert t5x_experts.chunk_room(opened, EXPERTS, SMALL).scratch == layer
    peak = peak_of(few, "rtn", SMALL)
    assert peak_of(many, "rtn", SMALL) - peak < ADDED / 4
    # What is held shows: with room for them, all experts of a matrix are kept in memory.
    assert t5x_experts.chunk_room(opened, EXPERTS, PLENTY).scratch == 0
    assert peak_of(many, "rtn", PLENTY) - peak > ADDED / 2


def compress_twice(checkpoint, output, method, read_budget):
    """In the fresh process: prints the peak of the second run."""
    folder = pathlib.Path(__file__).parent / "data" / "text"
    text = qmoe_jax.Text(
        sentencepiece_model_file=str(folder / "sentencepiece.model"),
        files=str(folder / "calibration.jsonl"),
        validation_files=str(folder / "heldout.jsonl"),
        task_feature_lengths={"inputs": 64},
        document_mode="split",
    )
    for run in ("compiling", "measured"):
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
        qmoe_jax.compress(
            checkpoint,
            f"{output}-{run}",
            text,
            quantizer=Quantizer(method=method),
            compute=Compute(experts_per_group=2, read_budget=int(read_budget)),
            num_samples=32,
            num_validation_samples=4,
            console=rich.console.Console(file=io.StringIO()),
        )
    status = pathlib.Path("/proc/self/status").read_text()
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    print(1024 * int(kilobytes))


if __name__ == "__main__":
    compress_twice(*sys.argv[1:])
