# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import tiny_switch

from qmoe_jax.checkpoints import packed, source
from qmoe_jax.checkpoints.packed_manifest import Header
from qmoe_jax.models import config as configs


@pytest.mark.parametrize("name", tiny_switch.MODELS)
def test_all_params_are_the_checkpoints(name):
    found = source.all_params(source.open_source(tiny_switch.DATA / name / "legacy"))
    expected = tiny_switch.flat_params(name)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path].astype(np.float32), array, err_msg=path)


def test_all_params_of_a_packed_store_in_several_groups(tmp_path):
    """Stored dense, in groups of three of eight experts: what goes in comes out, in order."""
    name = "tiny_switch_base"
    original = source.open_source(tiny_switch.DATA / name / "legacy")
    config, expected = original.config, tiny_switch.flat_params(name)
    packed.create(tmp_path / "store", Header(config, "dense", {}, {}))
    packed.commit_params(tmp_path / "store", "outer", source.outer_params(original))
    for stack in configs.STACKS:
        for layer in range(configs.num_layers(config, stack)):
            own = source.layer_params(original, stack, layer)
            prefix = f"{stack}/layers_{layer}"
            named = {f"{prefix}/{path}": array for path, array in own.items()}
            packed.commit_params(tmp_path / "store", f"{stack}.layers_{layer}", named)
            if layer in configs.sparse_layers(config, stack):
                for group in original.expert_groups(stack, layer, 3):
                    arrays = {key: np.asarray(array) for key, array in group.arrays.items()}
                    packed.commit_experts(tmp_path / "store", stack, layer, group.start, arrays)
    packed.finish(tmp_path / "store")
    found = source.all_params(source.open_source(tmp_path / "store"))
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)
