# SPDX-License-Identifier: Apache-2.0
"""Sizes from shapes, and back: against the trees of all nine released models."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import pytest
import tiny_switch
from flax.traverse_util import flatten_dict
from hypothesis import given
from hypothesis import strategies as st

from qmoe_jax.models import config as cfg
from qmoe_jax.models.switch import Switch

RELEASED = (
    *(f"switch-base-{E}" for E in (8, 16, 32, 64, 128, 256)),
    "switch-large-128",
    "switch-xxl-128",
    "switch-c-2048",
)


@functools.cache
def released(name):
    tree = json.loads((tiny_switch.DATA / "released_param_trees.json").read_text())[name]
    return tree | {"params": {path: tuple(shape) for path, shape in tree["params"].items()}}


@pytest.mark.parametrize("name", RELEASED)
def test_released_trees_are_rebuilt_exactly(name):
    tree = released(name)
    config = cfg.config_from_shapes(tree["params"])
    assert cfg.param_shapes(config) == tree["params"]
    assert list(config.encoder_sparse_layers) == tree["sparse_enc"]
    assert list(config.decoder_sparse_layers) == tree["sparse_dec"]
    assert config.logits_via_embedding == tree["tied"]
    assert sum(map(math.prod, cfg.param_shapes(config).values())) == tree["total"]


def test_sizes_of_switch_c():
    """Its heads are narrower together than the model: 30 * 64 < 2080."""
    assert cfg.config_from_shapes(released("switch-c-2048")["params"]) == cfg.SwitchConfig(
        vocab_size=32128,
        emb_dim=2080,
        num_heads=30,
        head_dim=64,
        mlp_dim=6144,
        expert_mlp_dim=6144,
        num_encoder_layers=15,
        num_decoder_layers=15,
        encoder_sparse_layers=tuple(range(15)),
        decoder_sparse_layers=tuple(range(15)),
        num_experts=2048,
        logits_via_embedding=False,
    )


def test_gated_model_is_recognised():
    config = cfg.config_from_shapes(released("switch-xxl-128")["params"])
    assert config.mlp_activations == ("gelu", "linear")
    assert cfg.expert_matrices(config) == ("wi_0", "wi_1", "wo")
    assert cfg.sparse_layers(config, "decoder") == tuple(range(1, 24, 2))


@pytest.mark.parametrize("name", ["switch-base-8", "switch-xxl-128", "switch-c-2048"])
def test_the_model_has_the_parameters_of_the_tree(name):
    shapes = released(name)["params"]
    tokens = jnp.zeros((1, 8), jnp.int32)
    model = Switch(cfg.config_from_shapes(shapes))
    params = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens, tokens)["params"]
    got = flatten_dict(jax.tree.map(lambda leaf: leaf.shape, params), sep="/")
    assert got == shapes
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def indices(layers):
    return st.sets(st.integers(0, layers - 1)).map(lambda chosen: tuple(sorted(chosen)))


@st.composite
def sizes(draw):
    size = st.integers(1, 9)
    layers = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    sparse = draw(indices(layers[0])), draw(indices(layers[1]))
    if not any(sparse):
        sparse = ((0,), ())
    all_sparse = (len(sparse[0]), len(sparse[1])) == layers
    expert_mlp_dim = draw(size)
    return {
        "vocab_size": draw(size),
        "emb_dim": draw(size),
        "num_heads": draw(size),
        "head_dim": draw(size),
        "mlp_dim": expert_mlp_dim if all_sparse else draw(size),
        "expert_mlp_dim": expert_mlp_dim,
        "num_encoder_layers": layers[0],
        "num_decoder_layers": layers[1],
        "encoder_sparse_layers": sparse[0],
        "decoder_sparse_layers": sparse[1],
        "num_experts": draw(size),
        "mlp_activations": draw(st.sampled_from([("relu",), ("gelu", "linear")])),
        "logits_via_embedding": draw(st.booleans()),
        "relpos_num_buckets": draw(size),
    }


@given(sizes())
def test_shapes_tell_the_config(sizes):
    config = cfg.SwitchConfig(**sizes)
    assert cfg.config_from_shapes(cfg.param_shapes(config)) == config


def edited(**edits):
    """The tree of switch-base-8 with arrays replaced, added, or (None) removed."""
    shapes = released("switch-base-8")["params"] | edits
    return {path: shape for path, shape in shapes.items() if shape is not None}


EXPERT = "encoder/layers_1/mlp/expert/wo/kernel"
QUERY = "encoder/layers_0/attention/query/kernel"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, "`token_embedder/embedding` is missing.*without the prefix"),
        (edited(**{"encoder/encoder_norm/scale": None}), "missing: `encoder/encoder_norm/scale`"),
        (edited(**{EXPERT: (8, 768, 3072)}), rf"`{EXPERT}` .*\(8, 3072, 768\).*\(8, 768, 3072\)"),
        (edited(**{EXPERT: (8, 3072)}), rf"`{EXPERT}` should have shape .*got \(8, 3072\)"),
        (edited(**{QUERY: (768, 767)}), f"`{QUERY}` has 767 columns, which 12 heads"),
        (edited(**{QUERY: (768,)}), f"`{QUERY}` should have the axes .*emb_dim, heads"),
        (edited(**{"encoder/bias": (3,)}), "does not have: `encoder/bias`"),
        (
            edited(**{"decoder/layers_99/x": (3,)}),
            "`decoder/layers_12/...` is missing",
        ),
    ],
)
def test_trees_of_other_models_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        cfg.config_from_shapes(shapes)


def test_plain_t5_gets_its_own_message():
    config = cfg.config_from_shapes(released("switch-base-8")["params"])
    dense = dataclasses.replace(config, encoder_sparse_layers=(), decoder_sparse_layers=())
    with pytest.raises(ValueError, match=r"dense model \(plain T5\)"):
        cfg.config_from_shapes(cfg.param_shapes(dense))


def test_long_lists_of_arrays_are_cut():
    shapes = edited(**{f"encoder/extra_{i}": (1,) for i in range(9)})
    with pytest.raises(ValueError, match="`encoder/extra_4` and 4 more"):
        cfg.config_from_shapes(shapes)
