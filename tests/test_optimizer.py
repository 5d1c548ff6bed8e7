# SPDX-License-Identifier: Apache-2.0
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qmoe_jax.training import optimizer
from qmoe_jax.training.optimizer import Optimizer

SHAPES = {  # of a tree with one parameter of each kind
    "token_embedder/embedding": (7, 4),
    "mlp/router/router_weights/w/kernel": (4, 3),
    "mlp/expert/wi/kernel": (3, 4, 5),
    "relpos_bias/rel_embedding": (2, 6),
    "pre_mlp_layer_norm/scale": (4,),
}


def tree(seed: int, scale: float = 1.0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    nested: dict[str, Any] = {}
    for path, shape in SHAPES.items():
        *folders, name = path.split("/")
        inner = nested
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)
    return nested


def leaf(nested: Any, path: str) -> np.ndarray:
    for name in path.split("/"):
        nested = nested[name]
    return np.asarray(nested, np.float64)


def run(options: Optimizer, gradients: list[Any]) -> Any:
    """Parameters after an update with each of the gradients."""
    schedule = optimizer.make_schedule(options, 0, 100)
    transformation = optimizer.make_optimizer(options, schedule)
    params = tree(0)
    state = transformation.init(params)
    update = jax.jit(transformation.update)
    for one in gradients:
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int's power
            updates, state = update(one, state, params)
        params = optax.apply_updates(params, updates)
    return params


def adafactor(param: np.ndarray, gradients: list[np.ndarray], rate: float, decay: float):
    """Adafactor (Shazeer & Stern 2018, algorithms 4 and 5, with T5X's constants) on one array."""
    row = column = whole = np.zeros(())
    for t, gradient in enumerate(gradients, start=1):
        beta = 1 - t**-0.8
        square = gradient**2 + 1e-30
        if param.ndim == 2:
            row = beta * row + (1 - beta) * square.mean(1)
            column = beta * column + (1 - beta) * square.mean(0)
            whole = np.outer(row, column) / row.mean()
        else:
            whole = beta * whole + (1 - beta) * square
        update = gradient / np.sqrt(whole)
        update /= max(1.0, np.sqrt((update**2).mean()))
        size = max(1e-3, np.sqrt((param**2).mean()))
        param = param * (1 - decay) - rate * size * update
    return param


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_adafactor_is_that_of_t5x(decay):
    """Matrices are factored whatever their size, each expert on its own; routers are not."""
    options = Optimizer(schedule="constant", learning_rate=0.3, warmup_steps=0, weight_decay=decay)
    gradients = [tree(seed, scale=10.0**seed) for seed in (1, 2, 3)]
    params = run(options, gradients)
    for path in SHAPES:
        before, history = leaf(tree(0), path), [leaf(one, path) for one in gradients]
        decays = 0.0 if path.endswith(("scale", "rel_embedding")) else decay
        if "expert" in path:
            expected = np.stack(
                [adafactor(before[e], [one[e] for one in history], 0.3, decays) for e in range(3)]
            )
        elif "router" in path or "relpos" in path:
            flat = adafactor(before.ravel(), [one.ravel() for one in history], 0.3, decays)
            expected = flat.reshape(before.shape)
        else:
            expected = adafactor(before, history, 0.3, decays)
        np.testing.assert_allclose(leaf(params, path), expected, rtol=2e-5, err_msg=path)


def test_adamw_is_that_of_the_paper():
    """Loshchilov & Hutter 2019, algorithm 2; norm scales and position biases do not decay."""
    options = Optimizer("adamw", "constant", 0.01, 0, None, 0.1, 0.8, 0.95)
    gradients = [tree(seed) for seed in (1, 2, 3)]
    params = run(options, gradients)
    for path in SHAPES:
        param, first, second = leaf(tree(0), path), np.zeros(()), np.zeros(())
        decay = 0.0 if path.endswith(("scale", "rel_embedding")) else 0.1
        for t, one in enumerate(gradients, start=1):
            gradient = leaf(one, path)
            first = 0.8 * first + 0.2 * gradient
            second = 0.95 * second + 0.05 * gradient**2
            step = first / (1 - 0.8**t) / (np.sqrt(second / (1 - 0.95**t)) + 1e-8)
            param = param - 0.01 * (step + decay * param)
        np.testing.assert_allclose(leaf(params, path), param, rtol=1e-5, err_msg=path)


def test_gradients_are_clipped_by_their_global_norm():
    gradients = tree(1)
    norm = float(optax.tree.norm(gradients))
    options = {"name": "adamw", "schedule": "constant", "warmup_steps": 0}
    # AdamW's second update depends on how large the second gradient is beside the first.
    history = [jax.tree.map(lambda leaf: 0.1 * leaf, gradients), gradients]
    clipped = run(Optimizer(max_grad_norm=norm / 2, **options), history)
    by_hand = [history[0], jax.tree.map(lambda leaf: leaf / 2, gradients)]
    expected = run(Optimizer(**options), by_hand)
    free = run(Optimizer(**options), history)
    for path in SHAPES:
        np.testing.assert_allclose(leaf(clipped, path), leaf(expected, path), rtol=1e-5)
        assert np.abs(leaf(clipped, path) - leaf(free, path)).max() > 1e-4


def test_all_that_is_kept_for_experts_is_kept_for_each():
    for name in optimizer.OPTIMIZERS:
        options = Optimizer(name)
        transformation = optimizer.make_optimizer(options, optimizer.make_schedule(options, 0, 9))
        state = transformation.init(tree(0))
        kept = [
            leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
            if any(getattr(key, "key", None) == "expert" for key in path)
            and any(getattr(key, "key", None) == "wi" for key in path)
        ]
        assert kept and all(shape[0] == 3 for shape in kept)


def rates(steps: list[int], first: int = 0, last: int = 100, **options: Any) -> list[float]:
    schedule = optimizer.make_schedule(Optimizer(**options), first, last)
    return [float(schedule(jnp.int32(step))) for step in steps]


def test_schedules():
    rsqrt = {"learning_rate": 2.0, "warmup_steps": 16}
    np.testing.assert_allclose(rates([0, 16, 64], **rsqrt), [0.5, 0.5, 0.25], rtol=1e-6)
    np.testing.assert_allclose(rates([0, 36], first=64, **rsqrt), [0.25, 0.2], rtol=1e-6)
    rising = {"learning_rate": 2.0, "warmup_steps": 20}
    steps, warmed = [0, 9, 19, 20, 60, 100, 200], [0.1, 1.0, 2.0]
    constant = rates(steps, schedule="constant", **rising)
    np.testing.assert_allclose(constant, [*warmed, 2, 2, 2, 2], rtol=1e-6)
    linear = rates(steps, schedule="linear", **rising)
    np.testing.assert_allclose(linear, [*warmed, 2, 1, 0, 0], rtol=1e-6)
    cosine = rates([0, 9, 19, 20, 40, 60, 100], schedule="cosine", **rising)
    quarter = 1 + math.cos(math.pi / 4)
    np.testing.assert_allclose(cosine, [*warmed, 2, quarter, 1, 0], rtol=1e-6, atol=1e-6)
    # A run that goes on from step 1000 has its own warm-up and decay.
    assert rates(steps, 1000, 1100, schedule="linear", **rising) == linear


def test_defaults_are_those_of_t5x():
    assert rates([0, 10_000, 40_000], last=100_000) == pytest.approx([0.01, 0.01, 0.005])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "sgd"}, "OPTIMIZER is 'sgd'; expected 'adafactor' or 'adamw'"),
        ({"schedule": "wave"}, "SCHEDULE is 'wave'; expected one of 'rsqrt', 'cosine', "),
        ({"learning_rate": 0.0}, "LEARNING_RATE is 0.0; expected a number above 0"),
        ({"learning_rate": math.nan}, "LEARNING_RATE is nan"),
        ({"warmup_steps": -1}, "WARMUP_STEPS is -1; expected 0 or more"),
        ({"max_grad_norm": 0.0}, "MAX_GRAD_NORM is 0.0; expected None or a number above 0"),
        ({"weight_decay": 1.0}, "WEIGHT_DECAY is 1.0; expected 0 to below 1"),
        ({"beta1": 1.0}, "BETA1 is 1.0"),
        ({"beta2": -0.1}, "BETA2 is -0.1"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Optimizer(**options)


def test_a_decay_needs_steps_after_the_warm_up():
    options = Optimizer(schedule="cosine", warmup_steps=50)
    with pytest.raises(ValueError, match="WARMUP_STEPS is 50; with SCHEDULE 'cosine' expected few"):
        optimizer.make_schedule(options, 60, 110)
