# SPDX-License-Identifier: Apache-2.0
"""Meshes of up to eight devices, which a CPU can be divided into; where there are fewer, pytest
runs this file once more in a process that has them."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import many_devices
import numpy as np
import pytest
import tiny_stores
import tiny_switch
from jax.sharding import AxisType, Mesh
from tiny_stores import Kind

from qmoe_jax.checkpoints import packed
from qmoe_jax.inference import decoding, load, scoring, sharding
from qmoe_jax.inference.model import Model
from qmoe_jax.models import config as configs
from qmoe_jax.models.moe import dense_experts

DEVICES = 8
EIGHT = dataclasses.replace(tiny_stores.CONFIG, num_experts=8)
GATED = dataclasses.replace(tiny_stores.GATED, num_experts=8)
GROUPS = ((0, 3), (3, 6), (6, 8))  # which no mesh cuts the experts at
KINDS = {
    "ternary": Kind("qmoe", config=EIGHT, groups=GROUPS),
    "tunstall": Kind("tunstall", config=EIGHT, groups=GROUPS),
    "2 bits": Kind("uniform", bits=2, config=EIGHT, groups=GROUPS),
    "3 bits": Kind("uniform", bits=3, group_size=16, config=GATED, groups=GROUPS),
    "4 bits": Kind("uniform", bits=4, config=EIGHT, groups=GROUPS),
    "dense": Kind("dense", config=GATED, groups=GROUPS),
}
ORIGINAL = "T5X"
NAMES = [*KINDS, ORIGINAL]
TRANSFER = re.compile(r" (all-|reduce-scatter|collective|send|recv)[\w-]*\(")


@pytest.fixture
def devices():
    return many_devices.first(DEVICES)


@pytest.mark.slow
def test_on_eight_devices():
    many_devices.run_again(__file__, DEVICES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The path of each, written once."""

    @functools.cache
    def path(name: str) -> pathlib.Path:
        if name == ORIGINAL:
            return tiny_switch.DATA / "tiny_switch_xxl" / "legacy"
        folder = tmp_path_factory.mktemp("store") / "store"
        tiny_stores.write(folder, KINDS[name])
        return folder

    return path


@functools.cache
def loaded(path: pathlib.Path, number: int | None) -> Model:
    return load.load(path, mesh=None if number is None else sharding.expert_mesh(number))


def through_experts(model: Model):
    """Tokens of all experts and dropped ones through the experts of one layer."""
    config, rng = model.config, np.random.default_rng(0)
    x_ND = jnp.asarray(rng.standard_normal((24, config.emb_dim)), jnp.float32)
    index_N = jnp.asarray(rng.permutation(np.arange(24) % 9), jnp.int32)
    experts = model.module.experts or functools.partial(
        dense_experts, activations=config.mlp_activations
    )
    own = {}
    for collection, tree in model.variables.items():
        mlp = tree["encoder"]["layers_1"]["mlp"]
        if "expert" in mlp:
            own[collection] = mlp["expert"]
    return np.asarray(jax.jit(experts)(own, x_ND, index_N)), index_N


@pytest.mark.parametrize("number", [1, 2, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_each_kind_of_experts_on_each_mesh(devices, checkpoint, name, number):
    path = checkpoint(name)
    expected, index_N = on_one_device(through_experts, path)
    found, _ = through_experts(loaded(path, number))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert ((np.abs(found).max(1) > 0) == (index_N < 8)).all()


def inputs(model: Model):
    """Prompts and targets, some of them padding."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(2, model.config.vocab_size, (3, 9)).astype(np.int32)
    prompts[1, 5:] = 0
    targets = rng.integers(2, model.config.vocab_size, (3, 7)).astype(np.int32)
    targets[2, 3:] = 0
    return prompts, targets


def scores(model: Model):
    return scoring.score(model, *inputs(model))


def decoded(model: Model):
    return decoding.generate(model, inputs(model)[0], 6, eos_id=-1)


@functools.cache
def on_one_device(function, path: pathlib.Path):
    return function(loaded(path, None))


@pytest.mark.parametrize(("name", "number"), [("3 bits", 4)])
def test_scores_are_those_of_one_device(devices, checkpoint, name, number):
    path = checkpoint(name)
    expected = on_one_device(scores, path)
    np.testing.assert_allclose(scores(loaded(path, number)), expected, rtol=1e-5)


@pytest.mark.parametrize(("name", "number"), [("ternary", 8), (ORIGINAL, 2)])
def test_tokens_are_those_of_one_device(devices, checkpoint, name, number):
    path = checkpoint(name)
    tokens, log_prob = on_one_device(decoded, path)
    found_tokens, found_log_prob = decoded(loaded(path, number))
    np.testing.assert_array_equal(found_tokens, tokens)
    np.testing.assert_allclose(found_log_prob, log_prob, rtol=1e-5)


@pytest.mark.parametrize("number", [1, 2, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_each_device_holds_its_own_experts_only(devices, checkpoint, name, number):
    model, cut = loaded(checkpoint(name), number), 0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(model.variables):
        path = jax.tree_util.keystr(keys)
        shards = sorted(leaf.addressable_shards, key=lambda shard: shard.device.id)
        assert [shard.device for shard in shards] == devices[:number], path
        if "'expert'" not in path or "'entries'" in path:
            assert all(shard.data.shape == leaf.shape for shard in shards), path
            continue
        cut += 1
        ternary = leaf.dtype == np.uint16  # whose codes are one slab a device
        assert leaf.shape[0] == (number if ternary else 8), path
        for place, shard in enumerate(shards):
            size = leaf.shape[0] // number
            assert shard.data.shape == (size, *leaf.shape[1:]), path
            assert shard.index[0].indices(leaf.shape[0]) == (place * size, (place + 1) * size, 1)
    arrays = {"ternary": 4, "tunstall": 6, "dense": 1, ORIGINAL: 1}.get(name, 3)
    assert cut == arrays * len(configs.expert_matrices(model.config)) * len(tiny_stores.PLACES)


@pytest.mark.parametrize("number", [1, 2, 8])
@pytest.mark.parametrize("name", ["ternary", "3 bits"])
def test_records_are_those_of_the_whole_layer(devices, checkpoint, name, number):
    """That is how they are laid out for so many slabs, though read slab by slab."""
    store = packed.open_checkpoint(checkpoint(name))
    for place in tiny_stores.PLACES:
        found = sharding.packed_layer(store, *place, sharding.expert_mesh(number))
        expected = packed.load_layer(store, *place)
        if name == "ternary":
            expected = packed.load_experts(store, *place, slabs=number)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other), strict=True)


@pytest.mark.parametrize("name", ["3 bits", ORIGINAL])
def test_each_array_counts_once(devices, checkpoint, name):
    assert loaded(checkpoint(name), 4).nbytes == loaded(checkpoint(name), None).nbytes


def test_ternary_codes_count_with_what_pads_their_slabs(devices, checkpoint):
    store = packed.open_checkpoint(checkpoint("ternary"))

    def codes(slabs: int) -> int:
        layers = [packed.load_experts(store, *place, slabs) for place in tiny_stores.PLACES]
        return sum(record.codes.nbytes for layer in layers for record in layer.values())

    one, four = (loaded(store.path, number).nbytes for number in (None, 4))
    assert four - one == codes(4) - codes(1)


def test_devices_may_be_any(devices, checkpoint):
    """Without the default one, in whatever order; and tokens one by one."""
    chosen, path = [devices[5], devices[2]], checkpoint("ternary")
    model = load.load(path, mesh=sharding.expert_mesh(chosen))
    assert {d for leaf in jax.tree.leaves(model.variables) for d in leaf.devices()} == set(chosen)
    streamed = decoding.stream(model, inputs(model)[0], 6, eos_id=-1)
    tokens, _ = on_one_device(decoded, path)
    np.testing.assert_array_equal(np.stack(list(streamed), axis=1), tokens)


def test_no_record_of_weights_is_gathered(devices, checkpoint):
    """Between devices go tokens alone: each transfer is one sum of their rows."""
    model = loaded(checkpoint("ternary"), 4)
    tokens = jnp.ones((3, 7), jnp.int32)
    compiled = jax.jit(model.module.apply).lower(model.variables, *[tokens] * 3).compile()
    text = compiled.as_text() or ""
    lines = [line for line in text.splitlines() if TRANSFER.search(line)]
    assert len(lines) == len(tiny_stores.PLACES)
    assert all(f"f32[21,{EIGHT.emb_dim}]" in line and "all-reduce" in line for line in lines)


@pytest.mark.parametrize("name", ["ternary", ORIGINAL])
def test_devices_must_divide_the_experts(devices, checkpoint, name):
    with pytest.raises(ValueError, match=r"8 experts .* 6 devices: make a mesh of 1, 2, 4 devices"):
        load.load(checkpoint(name), mesh=sharding.expert_mesh(6))


@pytest.mark.parametrize("number", [0, 9, -1])
def test_so_many_devices_must_be_there(devices, number):
    with pytest.raises(ValueError, match=f"`devices` is {number}; expected 1 to 8, which are"):
        sharding.expert_mesh(number)


def test_a_mesh_without_devices_is_refused():
    with pytest.raises(ValueError, match="`devices` is empty"):
        sharding.expert_mesh([])


def test_other_meshes_are_refused():
    grid = np.asarray(jax.devices()[:1])
    explicit = Mesh(grid, ("expert",), axis_types=(AxisType.Explicit,))
    for mesh in (Mesh(grid, ("data",)), Mesh(grid[None], ("data", "expert")), explicit):
        with pytest.raises(ValueError, match="expected one that `expert_mesh` made"):
            sharding.sharded_experts(mesh, EIGHT)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="devices of one process, but 2 were started"):
        sharding.expert_mesh()


@pytest.mark.parametrize(("tokens", "taken"), [(64, "fused"), (512, "dense")])
def test_the_path_follows_the_tokens_of_all_experts(devices, monkeypatch, tokens, taken):
    """64 are 8 for each of 8 experts, though each of 4 devices gets them all for 2."""
    seen = []

    def note(variables, x_ND, *_, path, **__):
        seen.append(path)
        return x_ND

    monkeypatch.setattr(sharding, "packed_experts", note)
    experts = sharding.sharded_experts(sharding.expert_mesh(4), EIGHT, "pallas")
    store = {"packed": {"wo": jnp.zeros((8, 1)), "entries": jnp.zeros(1)}}
    jax.eval_shape(experts, store, jnp.zeros((tokens, 35)), jnp.zeros(tokens, jnp.int32))
    assert seen == [taken]
