# SPDX-License-Identifier: Apache-2.0
"""Meshes of four devices, which a CPU can be divided into; where there are fewer, pytest runs this
file once more in a process that has them."""

import dataclasses
import functools
import io
from typing import Any

import jax
import many_devices
import numpy as np
import pytest
import rich.console
import tiny_switch
import tiny_training
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qmoe_jax.models.config import SwitchConfig
from qmoe_jax.models.routing import Capacity
from qmoe_jax.models.switch import Switch
from qmoe_jax.runs import train
from qmoe_jax.training import loss, parallel, program
from qmoe_jax.training.batches import Batch
from qmoe_jax.training.loss import Loss

DEVICES = 4
BATCH = tiny_training.batch(rows=8, inputs=12, targets=8)


@pytest.fixture
def devices():
    return many_devices.first(DEVICES)


@pytest.mark.slow
def test_on_four_devices():
    many_devices.run_again(__file__, DEVICES)


def gradients(config: SwitchConfig, mesh: Mesh, batch: Batch, capacity: Capacity):
    """Loss, metrics and gradients of a batch, with everything laid out on the mesh."""
    model = Switch(config, experts=parallel.experts_on(mesh, config), capacity=capacity)
    params = tiny_training.params(config)
    shardings = parallel.state_shardings(mesh, params, config.num_experts)
    call = tiny_switch.quick_jit(
        jax.value_and_grad(
            functools.partial(
                loss.training_loss, model=model, factors=Loss(), dropout_key=jax.random.key(1)
            ),
            has_aux=True,
        ),
        out_shardings=(None, shardings),
    )
    batch = jax.device_put(batch, parallel.batch_sharding(mesh))
    (value, metrics), found = call(jax.device_put(params, shardings), batch)
    return jax.device_get((value, metrics, found))


CONFIG = dataclasses.replace(tiny_training.MODEL, dropout_rate=0.1, expert_dropout_rate=0.2)


@functools.cache
def on_one_device(capacity):
    mesh = parallel.make_mesh(4, devices=jax.devices()[:1])
    return gradients(CONFIG, mesh, BATCH, capacity)


@pytest.mark.parametrize(
    ("partitions", "capacity"), [(1, "none"), (2, "none"), (4, "none"), (2, "t5x")]
)
def test_loss_and_gradients_are_those_of_one_device(devices, partitions, capacity):
    """With dropout, in experts too: its masks do not depend on the mesh either."""
    mesh = parallel.make_mesh(4, partitions, devices)
    assert mesh.devices.shape == (DEVICES // partitions, partitions)
    several = gradients(CONFIG, mesh, BATCH, capacity)
    one = on_one_device(capacity)
    both = zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(several), strict=True)
    for (path, expected), found in both:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=str(path))


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_steps_are_those_of_one_device(devices, name):
    options = tiny_training.Optimizer(name, "constant", 0.01, 0)
    recipe = tiny_training.recipe(optimizer=options)
    results = []
    for mesh in ({"devices": devices[:1]}, {"devices": devices, "partitions": 2}):
        built = program.build(recipe, dtype=np.float32, **mesh)
        state = program.new_state(built)
        for seed in range(3):
            batch = program.on_devices(built, tiny_training.batch(seed=seed))
            with jax.numpy_dtype_promotion("standard"):  # optax's AdamW
                state, metrics = built.train_step(state, batch)
        validation = program.evaluate(built, state.params, [tiny_training.batch(seed=9)])
        results.append((float(metrics["loss"]), validation, jax.device_get(state.params)))
    assert results[0][:2] == pytest.approx(results[1][:2], rel=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4),
        *[params for _, _, params in results],
    )
    placed = state.params["encoder"]["layers_0"]["mlp"]["expert"]["wi"]["kernel"]
    assert placed.addressable_shards[0].data.shape[0] == recipe.model.num_experts // 2


def test_what_is_kept_for_experts_lies_with_them(devices):
    built = program.build(tiny_training.recipe(), dtype=np.float32, devices=devices)
    cut = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(built.state)
        if leaf.sharding.spec == P("expert")
    }
    assert all("'expert'" in path for path in cut)
    # wi and wo: themselves, and Adafactor's v, v_row and v_col
    assert sum(".params" in path for path in cut) == 2
    assert sum("'wi'" in path for path in cut) == 4


def test_the_run_mode_resumes_on_another_mesh(devices, tmp_path):
    text = tiny_training.text(tmp_path)
    outputs = train.Outputs(save_period=2, save_dtype="float32", log_period=1)

    def run(folder: str, steps: int, partitions: int) -> dict[str, Any]:
        return train.train(
            tiny_training.DROPPING,
            str(tmp_path / folder),
            text,
            steps,
            batch_size=8,
            optimizer=tiny_training.OPTIMIZER,
            outputs=outputs,
            machine=train.Machine(num_expert_partitions=partitions),
            num_validation_samples=5,
            console=rich.console.Console(file=io.StringIO()),
        )

    straight = run("straight", 4, partitions=4)
    run("moved", 2, partitions=4)
    moved = run("moved", 4, partitions=2)
    assert moved["steps"] == straight["steps"] == [1, 2, 3, 4]
    for name in ("loss", "auxiliary_loss", "parameter_norm"):
        assert moved[name] == pytest.approx(straight[name], rel=1e-4)


def test_one_device_needs_no_mesh_of_experts():
    mesh = parallel.make_mesh(6, devices=jax.devices()[:1])
    assert mesh.devices.shape == (1, 1)
    assert parallel.experts_on(mesh, tiny_training.MODEL) is None


@pytest.mark.parametrize(
    ("number", "experts", "expected"), [(4, 8, (1, 4)), (6, 8, (3, 2)), (3, 8, (3, 1))]
)
def test_experts_are_spread_as_far_as_they_go(number, experts, expected):
    mesh = parallel.make_mesh(experts, devices=[jax.devices()[0]] * number)
    assert mesh.devices.shape == expected


@pytest.mark.parametrize("partitions", [0, 3, 8])
def test_partitions_must_divide_devices_and_experts(partitions):
    with pytest.raises(ValueError, match=f"NUM_EXPERT_PARTITIONS is {partitions}; .* such as 4"):
        parallel.make_mesh(8, partitions, [jax.devices()[0]] * 4)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="devices of one process, but 2 were started"):
        parallel.make_mesh(8)
