# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import pytest
import test_sub1_matmul
from test_sub1_matmul import NAMES, inputs

from pallas_kernels import packed_matmul
from pallas_kernels.testing import PUBLISHED, SMALL, Case

BUSY = Case("busy", 512, 768, (64, 0, 64, 7))


@pytest.mark.parametrize("at_a_time", [1, 2, 100])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_shape_by_decoding_some_experts_at_a_time(case, at_a_time):
    x, packed, entries, sizes, products = inputs(case)
    found = packed_matmul._by_decoding(
        x, packed, entries, sizes, "xla", scratch_bytes=at_a_time * 4 * case.rows * case.columns
    )
    test_sub1_matmul.assert_close(found, products, jnp.float32)


@pytest.mark.parametrize("path", ["fused", "dense"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_both_paths(dtype, path):
    *arguments, products = inputs(SMALL[NAMES.index("uneven")], dtype)
    found = packed_matmul.packed_matmul(*arguments, implementation="xla", path=path)
    test_sub1_matmul.assert_close(found, products, dtype)


@pytest.mark.parametrize(
    ("tokens", "experts", "expected"),
    [(0, 8, 0), (1, 128, 1), (8, 128, 1), (64, 8, 8), (512, 8, 64), (512, 1, 512)],
)
def test_tokens_of_an_expert(tokens, experts, expected):
    assert packed_matmul.tokens_per_expert(tokens, experts) == expected


@pytest.mark.parametrize(
    ("implementation", "tokens", "taken"),
    [("xla", 512, "fused"), ("pallas", 8, "fused"), ("pallas", 512, "dense")],
)
def test_the_path_follows_the_tokens(implementation, tokens, taken, monkeypatch):
    seen = []

    def note(path):
        return lambda x, packed, *_, **__: seen.append(path) or jnp.zeros((len(x), packed.shape[1]))

    monkeypatch.setattr(packed_matmul, "sub1_matmul", note("fused"))
    monkeypatch.setattr(packed_matmul, "_by_decoding", note("dense"))
    _, packed, entries, sizes, _ = inputs(Case("small", 8, 64, (1, 1)))
    x = jnp.zeros((tokens, 64))
    packed_matmul.packed_matmul(x, packed, entries, sizes, implementation=implementation)
    assert seen == [taken]


def test_arguments_that_do_not_fit():
    *arguments, _ = inputs(Case("small", 8, 64, (1, 1)))
    with pytest.raises((ValueError, TypeError), match="both"):  # tests check types first
        packed_matmul.packed_matmul(*arguments, path="both")  # pyright: ignore


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["pallas", "triton"])
@pytest.mark.parametrize("path", ["fused", "dense"])
@pytest.mark.parametrize("case", [*SMALL, *PUBLISHED, BUSY], ids=lambda case: case.name)
def test_every_shape_on_the_device(case, path, implementation):
    *arguments, products = inputs(case, jnp.bfloat16)
    found = packed_matmul.packed_matmul(*arguments, implementation=implementation, path=path)
    test_sub1_matmul.assert_close(found, products, jnp.bfloat16)
