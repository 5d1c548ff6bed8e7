# SPDX-License-Identifier: Apache-2.0
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_stores
import tiny_switch
from flax.traverse_util import unflatten_dict
from tiny_stores import Kind

from qmoe_jax.checkpoints import source
from qmoe_jax.codec import packing
from qmoe_jax.inference import load
from qmoe_jax.models.switch import Switch

pytestmark = pytest.mark.usefixtures("quick_compilation")

KINDS = [
    Kind("qmoe"),
    Kind("qmoe", config=tiny_stores.GATED),
    Kind("tunstall"),
    Kind("uniform", bits=2),
    Kind("uniform", bits=3, group_size=16),
    Kind("uniform", bits=4, config=tiny_stores.GATED),
    Kind("dense"),
]


def batch(config, seed=0):
    """Encoder inputs, decoder inputs and targets, some of them padding."""
    rng = np.random.default_rng(seed)
    inputs = rng.integers(1, config.vocab_size, (3, 9)).astype(np.int32)
    inputs[1, 5:] = 0
    targets = rng.integers(1, config.vocab_size, (3, 7)).astype(np.int32)
    targets[2, 3:] = 0
    shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    return tuple(map(jnp.asarray, (inputs, shifted, targets)))


def dense_logits(path, tokens):
    """Those of the same checkpoint, all of it dequantized."""
    opened = source.open_source(path)
    flat = {name: jnp.asarray(a, jnp.float32) for name, a in source.all_params(opened).items()}
    params = unflatten_dict(flat, sep="/")
    return tiny_switch.logits(Switch(opened.config), {"params": params}, *tokens)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_logits_are_those_of_the_dequantized_model(kind, tmp_path):
    tiny_stores.write(tmp_path / "store", kind)
    model = load.load(tmp_path / "store")
    tokens = batch(model.config)
    expected = np.asarray(dense_logits(tmp_path / "store", tokens))
    found = tiny_switch.logits(model.module, model.variables, *tokens)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", KINDS[:5], ids=str)
def test_packed_experts_stay_packed(kind, tmp_path):
    store = tiny_stores.write(tmp_path / "store", kind)
    model = load.load(tmp_path / "store")
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(model.variables)]
    assert not any("expert" in name and "kernel" in name for name in names)
    table = 0 if kind.codec == "uniform" else packing.entries(kind.codec).nbytes
    if kind.codec == "tunstall":  # where the signs of each row begin
        rows = sum(kind.config.emb_dim + kind.config.expert_mlp_dim for _ in tiny_stores.PLACES)
        table += 4 * kind.config.num_experts * (rows + 4)
    padding = (
        2
        * 64
        * sum(  # of each expert's words to a multiple of 64
            kind.config.num_experts * 3 for _ in tiny_stores.PLACES
        )
    )
    # In memory these are float32.
    wider = sum(
        4 * math.prod(entry.shape) - entry.nbytes
        for groups in store.groups.values()
        for group in groups
        for name, entry in group.file.arrays.items()
        if name.endswith(("/scale", "/zero"))
    )
    assert (wider > 0) == (kind.codec == "uniform")
    assert model.nbytes <= store.nbytes + table + padding + wider


@pytest.mark.parametrize("name", tiny_switch.MODELS)
def test_original_checkpoints_too(name):
    path = tiny_switch.DATA / name / "legacy"
    model = load.load(path)
    tokens = batch(model.config)
    expected = np.asarray(dense_logits(path, tokens))
    found = np.asarray(tiny_switch.logits(model.module, model.variables, *tokens))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
