# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_stores
import tiny_switch
from test_load import batch
from tiny_stores import Kind

from qmoe_jax.inference import decoding, load
from qmoe_jax.inference.simulated_dense import COLLECTION, simulated_dense
from qmoe_jax.models.switch import Switch

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("config", [tiny_stores.CONFIG, tiny_stores.GATED], ids=["plain", "gated"])
def test_it_is_a_dense_model_of_equal_experts(config, tmp_path):
    tiny_stores.write(tmp_path / "store", Kind("qmoe", config=config))
    model = load.load(tmp_path / "store")
    simulated = simulated_dense(model)
    assert "packed" not in simulated.variables
    params = jax.tree.map(np.asarray, simulated.variables["params"])
    for (stack, layer), _ in zip(tiny_stores.PLACES, range(2), strict=True):
        own = simulated.variables[COLLECTION][stack][f"layers_{layer}"]["mlp"]["expert"]
        mlp = params[stack][f"layers_{layer}"]["mlp"]
        assert "expert" not in mlp
        mlp["expert"] = {
            name: {"kernel": np.repeat(np.asarray(matrix).T[None], config.num_experts, 0)}
            for name, matrix in own.items()
        }
    tokens = batch(model.config)
    whole = {"params": jax.tree.map(jnp.asarray, params)}
    expected = np.asarray(tiny_switch.logits(Switch(config), whole, *tokens))
    found = tiny_switch.logits(simulated.module, simulated.variables, *tokens)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    generated, _ = decoding.generate(simulated, np.asarray(tokens[0]), 3, eos_id=-1)
    assert generated.shape == (3, 3)
