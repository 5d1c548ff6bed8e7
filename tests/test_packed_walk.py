# SPDX-License-Identifier: Apache-2.0
import codec_oracles
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_stores
from tiny_stores import GATED, Kind

from qmoe_jax.calibration import experts
from qmoe_jax.calibration.buffers import TokenBuffer
from qmoe_jax.calibration.walk import Routes
from qmoe_jax.checkpoints import source
from qmoe_jax.codec import packing
from qmoe_jax.inference import packed_walk
from qmoe_jax.models.block import make_block


@pytest.mark.parametrize("implementation", ["xla", pytest.param("pallas", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "kind",
    [
        Kind("qmoe"),
        Kind("qmoe", config=GATED),
        Kind("tunstall"),
        Kind("uniform", bits=3, group_size=16),
    ],
)
def test_a_group_adds_what_its_dense_matrices_add(kind, implementation, monkeypatch):
    """Several pieces of a group that begins with expert 1; the rows of other experts stay."""
    monkeypatch.setattr(packed_walk, "PIECE", 64)
    monkeypatch.setattr(packed_walk, "TAIL", 16)
    rng = np.random.default_rng(0)
    config = kind.config
    block = make_block(config, "encoder", 1, np.dtype(np.float32))
    params = {"pre_mlp_layer_norm": {"scale": jnp.asarray(rng.random(config.emb_dim, np.float32))}}
    records = tiny_stores.experts(kind, ("encoder", 1), (0, 2))
    tokens = 150
    routes = Routes(rng.integers(0, 4, tokens).astype(np.int32), rng.random(tokens, np.float32))
    assigned = experts.assign(routes, 3)  # 3 of them: a dropped token
    start = rng.standard_normal((tokens, config.emb_dim)).astype(np.float32)
    dense, packed = (TokenBuffer(start.copy(), np.array([0, tokens])) for _ in range(2))
    for group in source.dequantized(1, records, 1):
        kernels = jax.tree.map(jnp.asarray, group.arrays)
        experts.run_experts(block, params, kernels, group.start, dense, routes, assigned)
    on_device = jax.tree.map(jnp.asarray, packed_walk.prepare(records))
    packed_walk.run_packed_experts(
        block, params, on_device, 1, packed, routes, assigned, implementation=implementation
    )
    others = (routes.expert == 0) | (routes.expert == 3)
    np.testing.assert_array_equal(packed.data[others], start[others])
    assert not np.array_equal(packed.data, start)
    np.testing.assert_allclose(
        packed.data, dense.data, rtol=0, atol=1e-5 * np.abs(dense.data).max()
    )


def test_groups_of_one_shape_share_a_program():
    """Though sparser weights take fewer words."""
    groups = []
    for zeros in (0.85, 0.9):
        trits = codec_oracles.random_trits(0, (2, 200, 300), zeros)
        values = np.tile(np.array([-1, 1], np.float32), (2, 200, 1))
        groups.append({"wi": packing.pack_ternary(trits, values)})
    assert groups[0]["wi"].codes.shape != groups[1]["wi"].codes.shape
    one, other = (packed_walk.prepare(group) for group in groups)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert [leaf.shape for leaf in jax.tree.leaves(one)] == [
        leaf.shape for leaf in jax.tree.leaves(other)
    ]
