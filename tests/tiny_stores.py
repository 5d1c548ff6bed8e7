# SPDX-License-Identifier: Apache-2.0
"""Complete packed stores of a tiny model, in every codec, with random weights."""

import dataclasses
import functools
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

import codec_oracles
import jax
import ml_dtypes
import numpy as np

from pallas_kernels import packed as packed_lib
from pallas_kernels.packed import PackedExperts
from qmoe_jax.checkpoints import packed
from qmoe_jax.checkpoints.packed_manifest import Codec, Header, PackedCheckpoint
from qmoe_jax.codec import packing, uniform
from qmoe_jax.models import config as configs
from qmoe_jax.models.config import Stack, SwitchConfig

CONFIG = SwitchConfig(
    vocab_size=11,
    emb_dim=35,
    num_heads=1,
    head_dim=3,
    mlp_dim=6,
    expert_mlp_dim=41,
    num_encoder_layers=2,
    num_decoder_layers=1,
    encoder_sparse_layers=(1,),
    decoder_sparse_layers=(0,),
    num_experts=3,
    relpos_num_buckets=4,
)
GATED = dataclasses.replace(
    CONFIG, mlp_activations=("gelu", "linear"), logits_via_embedding=False, eval_capacity_factor=3.5
)
PLACES: tuple[tuple[Stack, int], ...] = (("encoder", 1), ("decoder", 0))
GROUPS = ((0, 2), (2, 3))


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a store holds; `dtype` is that of all that is not packed."""

    codec: Codec
    bits: Any = "ternary"
    group_size: int | None = None
    dtype: Any = np.float32
    config: SwitchConfig = CONFIG
    groups: tuple[tuple[int, int], ...] = GROUPS  # bounds, of each layer


def header(kind: Kind) -> Header:
    quantizer = {"method": "gptq", "bits": kind.bits, "group_size": kind.group_size}
    return Header(kind.config, kind.codec, {"quantizer": quantizer, "text": []}, {"step": 7})


@functools.cache
def params(kind: Kind) -> dict[str, np.ndarray]:
    """All parameters that are no experts, by path."""
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape).astype(kind.dtype)
        for name, shape in configs.param_shapes(kind.config).items()
        if "/mlp/expert/" not in name
    }


@functools.cache
def experts(kind: Kind, place: tuple[Stack, int], bounds: tuple[int, int]) -> dict[str, Any]:
    """The records of one group, no two groups alike."""
    D, F = kind.config.emb_dim, kind.config.expert_mlp_dim
    records = {}
    for number, name in enumerate(configs.expert_matrices(kind.config)):
        E, C, R = bounds[1] - bounds[0], *((F, D) if name == "wo" else (D, F))
        seed = 100 * number + 10 * PLACES.index(place) + bounds[0]
        records[name] = _record(kind, seed, (E, R, C))
    return records


def _record(kind: Kind, seed: int, shape: tuple[int, int, int]) -> Any:
    rng, (E, R, C) = np.random.default_rng(seed), shape
    if kind.codec == "dense":
        return rng.standard_normal((E, C, R)).astype(kind.dtype)
    if kind.codec in packing.CODECS:
        values = rng.integers(1, 100, (E, R, 2)) * np.array([-1, 1])
        trits = codec_oracles.random_trits(seed, shape, 0.8)
        return packing.pack_ternary(trits, values.astype(np.float32), kind.codec)
    levels = rng.integers(0, 2**kind.bits, shape).astype(np.uint8)
    groups = (E, R, -(-C // (kind.group_size or C)))
    scale = rng.random(groups).astype(ml_dtypes.bfloat16).astype(np.float32)
    zero = rng.integers(0, 2**kind.bits, groups).astype(np.float32)
    whole_row = uniform.WHOLE_ROW
    return uniform.pack_uniform(levels, scale, zero, kind.bits, kind.group_size or whole_row)


def commits(kind: Kind) -> Iterator[tuple[Any, ...]]:
    """The functions and arguments (without the path) that fill a store, in no special order."""
    for place in reversed(PLACES):
        for bounds in reversed(kind.groups):
            yield packed.commit_experts, *place, bounds[0], experts(kind, place, bounds)
    everything = params(kind)
    for prefix in ("encoder/layers_0/", "encoder/layers_1/", "decoder/layers_0/"):
        layer = {name: array for name, array in everything.items() if name.startswith(prefix)}
        yield packed.commit_params, prefix[:-1].replace("/", "."), layer
    outer = {name: array for name, array in everything.items() if "/layers_" not in name}
    yield packed.commit_params, "outer", outer


def write(path: pathlib.Path, kind: Kind) -> PackedCheckpoint:
    packed.create(path, header(kind))
    for commit, *arguments in commits(kind):
        commit(path, *arguments)
    return packed.finish(path)


def seal(manifest: dict[str, Any]) -> bytes:
    """A manifest that was changed, with the checksum of the journal that would make it."""
    head = {k: v for k, v in manifest.items() if k not in ("journal_crc32", "entries")}
    entries = manifest.get("entries")
    lines = [head, *(entries if isinstance(entries, list) else [])]
    journal = "".join(json.dumps(line) + "\n" for line in lines)
    return json.dumps(manifest | {"journal_crc32": zlib.crc32(journal.encode())}).encode()


def assert_same(found: Any, expected: Any) -> None:
    """Two records are the same bit for bit, whatever pads them."""
    assert type(found) is type(expected) or not isinstance(found, PackedExperts)
    if isinstance(found, PackedExperts):
        expected = packed_lib.expert_slice(expected, 0, expected.shape[0])
        found = packed_lib.expert_slice(found, 0, found.shape[0])
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.tobytes() == other.tobytes()
