# SPDX-License-Identifier: Apache-2.0
"""How fast a packed model generates, and in how much memory, beside an idealised dense one.

    python benchmarks/generate.py --model=switch_base_128 [--batches=1,32] [--tokens=128]
    python benchmarks/generate.py --model=switch_c_2048 --layers=1     # of each stack: what fits
    python benchmarks/generate.py --checkpoint=packed                  # a packed checkpoint
    python benchmarks/generate.py --model=switch_base_128 --memory=FOLDER

Without a checkpoint the experts are random words with the density that the paper gives, and all
else is random numbers: speed and memory do not depend on what a model says. The dense model is the
paper's idealised one: all experts of a layer share one buffer, in the dtype of the activations, so
that it fits (`infer` has it as SIMULATE_DENSE). Both decode the same number of tokens for the same
prompts of 64 tokens; neither ends early. The first call compiles and is not counted; of the others
the median, and the two models take turns.

With fewer `--layers` than the model has, the time is multiplied to the model's own number, which
the table says. `--memory` writes such a checkpoint to a folder (1.3 GB for switch_base_128), loads
it in a fresh process, generates, and gives the most memory that the process ever had.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time

import gin
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import random_experts
import rich.console
import rich.table
from flax.traverse_util import unflatten_dict

from pallas_kernels.packed import PackedExperts
from qmoe_jax.checkpoints import packed
from qmoe_jax.checkpoints.packed_manifest import Header
from qmoe_jax.codec import packing
from qmoe_jax.inference import decoding, load
from qmoe_jax.inference.model import Model
from qmoe_jax.inference.packed_experts import COLLECTION, packed_experts
from qmoe_jax.inference.simulated_dense import simulated_dense
from qmoe_jax.models import config as configs
from qmoe_jax.models import dtypes
from qmoe_jax.models.config import SwitchConfig
from qmoe_jax.models.switch import Switch
from qmoe_jax.runs import devices

ROOT = pathlib.Path(__file__).resolve().parents[1]
ZEROS = {"switch_base_128": 0.857, "switch_large_128": 0.864, "switch_c_2048": 0.886}  # the paper's
PROMPT = 64  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of generation")
    parser.add_argument("--model", default="switch_base_128", help="of t5x_configs/models")
    parser.add_argument("--checkpoint", help="a packed checkpoint; then --model says nothing")
    parser.add_argument("--codec", choices=packing.CODECS, default="qmoe")
    parser.add_argument("--layers", type=int, help="of each stack; all of them by default")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--activation_dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--memory", type=pathlib.Path, help="a new folder on a disk with room")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)  # `memory_table`
    given = parser.parse_args()
    console = rich.console.Console(width=120)
    if given.peak:
        print(json.dumps(peak(given.checkpoint, given.tokens)))
        return
    if given.memory:
        config = model_config(given.model, given.layers)
        zeros = ZEROS.get(given.model, 0.885)
        console.print(memory_table(given.memory, config, zeros, given.codec, given.tokens))
        return
    dtype = dtypes.activation_dtype(given.activation_dtype)
    console.print(f"{devices.description()}, jax {jax.__version__}, activations in {dtype.name}")
    if given.checkpoint:
        name, scale = given.checkpoint, 1.0
        model = load.load(given.checkpoint, dtype=dtype)
    else:
        whole = model_config(given.model, None)
        config = model_config(given.model, given.layers)
        scale = whole.num_decoder_layers / config.num_decoder_layers
        name = given.model
        model = random_model(config, ZEROS.get(given.model, 0.885), given.codec, dtype)
    batches = [int(batch) for batch in given.batches.split(",")]
    console.print(speed_table(name, model, scale, batches, given.tokens, given.repeats))


def model_config(name: str, layers: int | None) -> SwitchConfig:
    """Of a gin file; of it the first `layers` of each stack, or as many as there are."""
    gin.clear_config()
    gin.add_config_file_search_path(str(ROOT))
    gin.parse_config_file(f"t5x_configs/models/{name}.gin")
    gin.finalize()
    config = gin.get_configurable("MODEL/gin.macro")()
    if layers is None:
        return config
    for stack in configs.STACKS:
        sparse = configs.sparse_layers(config, stack)
        if not sparse[0] < layers <= configs.num_layers(config, stack):
            raise SystemExit(
                f"--layers={layers}: the {stack} of {name} has {configs.num_layers(config, stack)} "
                f"layers, the first sparse one is number {sparse[0] + 1}"
            )
    return dataclasses.replace(
        config,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        encoder_sparse_layers=tuple(i for i in config.encoder_sparse_layers if i < layers),
        decoder_sparse_layers=tuple(i for i in config.decoder_sparse_layers if i < layers),
    )


def speed_table(
    name: str, model: Model, scale: float, batches: list[int], tokens: int, repeats: int
) -> rich.table.Table:
    """Both models, taking turns."""
    table = rich.table.Table(
        *("batch", "experts", "tokens/s", "ms a token and row", "packed / dense", "memory"),
        title=f"{name}, {tokens} tokens" + (f", times x {scale:g}" if scale != 1 else ""),
    )
    models = {"packed": model, "idealised dense": simulated_dense(model)}
    for batch in batches:
        prompt = np.random.default_rng(0).integers(2, model.config.vocab_size, (batch, PROMPT))
        prompt = prompt.astype(np.int32)
        seconds: dict[str, list[float]] = {each: [] for each in models}
        for repeat in range(repeats + 1):
            for each, own in models.items():
                begun = time.perf_counter()
                decoding.generate(own, prompt, tokens, eos_id=-1)
                if repeat:
                    seconds[each].append(scale * (time.perf_counter() - begun))
        median = {each: statistics.median(found) for each, found in seconds.items()}
        for each, own in models.items():
            spread = (max(seconds[each]) - min(seconds[each])) / median[each]
            table.add_row(
                str(batch),
                each,
                f"{batch * tokens / median[each]:,.1f} ± {spread:.0%}",
                f"{1e3 * median[each] / tokens / batch:.2f}",
                f"{median['packed'] / median['idealised dense']:.2f}" if each == "packed" else "",
                f"{own.nbytes / 1e9:.3f} GB",
            )
        table.add_section()
    return table


def random_model(
    config: SwitchConfig, zeros: float, codec: packing.Codec, dtype: np.dtype
) -> Model:
    """On the device; layers of equal shape hold copies of their own."""
    params = {path: jnp.asarray(array) for path, array in random_params(config, dtype)}
    entries = jnp.asarray(packing.entries(codec))
    made: dict[str, PackedExperts] = {}
    records = {}
    for stack in configs.STACKS:
        for layer in configs.sparse_layers(config, stack):
            below = f"{stack}/layers_{layer}/mlp/expert"
            records[f"{below}/entries"] = entries
            for matrix in configs.expert_matrices(config):
                if matrix not in made:
                    made[matrix] = random_experts.experts(
                        matrix_shape(config, matrix, config.num_experts), zeros, codec
                    )
                records[f"{below}/{matrix}"] = jax.tree.map(jnp.array, made[matrix])
    experts = functools.partial(packed_experts, activations=config.mlp_activations)
    variables = {
        "params": unflatten_dict(params, sep="/"),
        COLLECTION: unflatten_dict(records, sep="/"),
    }
    return Model(Switch(config, dtype, experts), variables)


def random_params(config: SwitchConfig, dtype: np.dtype):
    """All that is no experts, one array at a time."""
    generator = np.random.default_rng(0)
    for path, shape in configs.param_shapes(config).items():
        if "/expert/" not in path:
            scale = 1.0 if path.endswith("scale") else shape[0] ** -0.5
            yield path, (scale * generator.standard_normal(shape, np.float32)).astype(dtype)


def matrix_shape(config: SwitchConfig, matrix: str, experts: int) -> tuple[int, int, int]:
    """Experts, rows, columns."""
    rows, columns = config.expert_mlp_dim, config.emb_dim
    return (experts, columns, rows) if matrix == "wo" else (experts, rows, columns)


def memory_table(
    folder: pathlib.Path, config: SwitchConfig, zeros: float, codec: packing.Codec, tokens: int
) -> rich.table.Table:
    """Of a process that loads a packed checkpoint, and of one that loads nothing."""
    if not packed.is_packed(folder):
        write_store(folder, config, zeros, codec)
    found = json.loads(child(folder, tokens))
    nothing = json.loads(child(None, tokens))
    checkpoint = packed.open_checkpoint(folder)
    if checkpoint.header.config != config:
        raise SystemExit(f"{folder} holds another model: give a new folder")
    dense = sum({file.name: file.nbytes for file in checkpoint.params.values()}.values())
    limit = 2 * checkpoint.nbytes + dense
    table = rich.table.Table("", "bytes", title=f"Memory of {folder}, {tokens} tokens")
    table.add_row("packed checkpoint", f"{checkpoint.nbytes:,}")
    table.add_row("of it dense parameters", f"{dense:,}")
    table.add_row("arrays of the model", f"{found['arrays']:,}")
    table.add_row("an interpreter with JAX, idle", f"{nothing['peak']:,}")
    table.add_row("peak of the process", f"{found['peak']:,}")
    table.add_row("twice the checkpoint plus dense parameters", f"{limit:,}")
    return table


def child(folder: pathlib.Path | None, tokens: int) -> str:
    """What `peak` prints in a process of its own."""
    command = [sys.executable, __file__, "--peak", f"--tokens={tokens}"]
    command += [f"--checkpoint={folder}"] if folder else []
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def peak(checkpoint: str | None, tokens: int) -> dict[str, int]:
    """The most memory of this process, after it generated."""
    arrays = 0
    if checkpoint is None:
        jnp.zeros(1).block_until_ready()
    else:
        model = load.load(checkpoint)
        arrays = model.nbytes
        decoding.generate(model, np.full((1, PROMPT), 5, np.int32), tokens, eos_id=-1)
    return {"arrays": arrays, "peak": devices.peak_host_bytes()}


def write_store(
    folder: pathlib.Path, config: SwitchConfig, zeros: float, codec: packing.Codec
) -> None:
    """A packed checkpoint; groups of 16 experts, as a compression might have made them."""
    quantizer = {"method": "gptq", "bits": "ternary", "group_size": None}
    packed.create(folder, Header(config, codec, {"quantizer": quantizer, "text": []}, {}))
    stored = np.dtype(ml_dtypes.bfloat16)
    packed.commit_params(folder, "all", dict(random_params(config, stored)))
    size = min(16, config.num_experts)
    matrices = configs.expert_matrices(config)
    group = {
        matrix: random_experts.experts(matrix_shape(config, matrix, size), zeros, codec)
        for matrix in matrices
    }
    for stack in configs.STACKS:
        for layer in configs.sparse_layers(config, stack):
            for start in range(0, config.num_experts, size):
                packed.commit_experts(folder, stack, layer, start, group)
    packed.finish(folder)


if __name__ == "__main__":
    main()
