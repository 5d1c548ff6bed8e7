# SPDX-License-Identifier: Apache-2.0
"""Packs of the published code: what it computed with one, and every way in which one is refused."""

import io
import json
import pathlib
import shutil

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import rich.console
import tiny_switch
import torch_files
from flax.traverse_util import unflatten_dict
from hypothesis import strategies as st

from pallas_kernels.packed import PackedExperts
from qmoe_jax.checkpoints import (
    huggingface,
    packed,
    published,
    published_import,
    source,
    torch_pickle,
)
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.codec import packing
from qmoe_jax.models.config import Stack
from qmoe_jax.models.switch import Switch
from qmoe_jax.runs import import_pack

LAYERS: tuple[tuple[Stack, int], ...] = (
    ("encoder", 1),
    ("encoder", 3),
    ("decoder", 1),
    ("decoder", 3),
)
FIRST = "encoder.block.1.layer.1.mlp.experts.expert_0.wi"


@pytest.fixture(scope="module")
def pack(data_dir):
    return data_dir / "qmoe" / "tiny_qmoe_ckpt"


@pytest.fixture(scope="module")
def expected(data_dir):
    with np.load(data_dir / "qmoe" / "tiny_ckpt_expected.npz") as file:
        return dict(file)


def run_import(folder, output, **options) -> None:
    console = rich.console.Console(file=io.StringIO())
    import_pack.import_pack(str(folder), str(output), console=console, **options)


def imported(pack, folder, **options):
    return published_import.import_checkpoint(published.open_checkpoint(pack), folder, **options)


@pytest.fixture(scope="module")
def store(pack, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported") / "store"
    return imported(pack, folder, experts_per_group=3)


@pytest.fixture
def copy(pack, tmp_path):
    return pathlib.Path(shutil.copytree(pack, tmp_path / "pack"))


def tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    archive = torch_pickle.open_archive(path)
    refs = torch_pickle.read_object(archive)
    return {name: torch_pickle.read_tensor(archive, ref) for name, ref in refs.items()}


def change(path: pathlib.Path, **arrays: np.ndarray | None) -> None:
    """Writes a file of tensors again; names are those after `FIRST`; None leaves one out."""
    changed = tensors(path) | {f"{FIRST}.{key}": array for key, array in arrays.items()}
    torch_files.write_state_dict(path, {k: v for k, v in changed.items() if v is not None})


def set_config(folder: pathlib.Path, **settings: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_logits_of_the_published_code(store, expected):
    opened = source.open_source(store.path)
    assert (opened.format, opened.step) == ("packed", None)
    params = source.all_params(opened)
    tree = unflatten_dict({k: jnp.asarray(v, jnp.float32) for k, v in params.items()}, sep="/")
    apply = tiny_switch.quick_jit(Switch(opened.config).apply)
    pads = max(expected[f"{i}/{part}"].size for i in range(4) for part in ("enc", "dec"))
    for i in range(4):
        inputs, outputs = expected[f"{i}/enc"], expected[f"{i}/dec"]
        length = outputs.size
        rows = [np.pad(row, (0, pads - row.size))[None] for row in (inputs, outputs)]
        targets = (np.arange(pads) < length).astype(np.int32)[None]  # only whether there is one
        found = apply({"params": tree}, rows[0], rows[1], targets)[0, :length]
        np.testing.assert_allclose(found, expected[f"{i}/logits_f32"], rtol=0, atol=1e-4)


def test_matrices_of_the_published_code(store, expected):
    params = source.all_params(source.open_source(store.path))
    names = [name for name in expected if name.startswith("deq/")]
    assert len(names) == 3
    for name in names:
        stack, _, layer, *_, expert, matrix, _ = name.removeprefix("deq/").split(".")
        stacked = params[f"{stack}/layers_{layer}/mlp/expert/{matrix}/kernel"]
        kernel = stacked[int(expert.removeprefix("expert_"))]
        np.testing.assert_array_equal(kernel.T.astype(np.float32), expected[name])


def test_every_word_comes_back(pack, store):
    """And in the groups that were asked for."""
    seen = 0
    for number, (stack, layer) in enumerate(LAYERS):
        original = tensors(pack / f"exp{number:02d}.pt")
        groups = list(packed.read_groups(store, stack, layer))
        assert [(group.start, group.stop) for group, _ in groups] == [(0, 3), (3, 6), (6, 8)]
        for group, matrices in groups:
            for matrix, record in matrices.items():
                assert isinstance(record, PackedExperts)
                for expert in range(group.start, group.stop):
                    path = f"{stack}/layers_{layer}/mlp/expert/{matrix}/kernel"
                    name = huggingface.hf_name(path).format(expert).removesuffix(".weight")
                    found = packing.to_published(record, expert - group.start)
                    for key in ("w_comp", "row_off", "ter_minmax"):
                        wanted = original.pop(f"{name}.{key}")
                        assert getattr(found, key).tobytes() == wanted.tobytes()
                        seen += 1
        assert all(name.endswith(".weight") and not a.size for name, a in original.items())
    assert seen == 4 * 8 * 2 * 3


def test_everything_else_is_as_stored(pack, store):
    original, count = tensors(pack / "noexp.pt"), 0
    for path in store.params:
        (found,) = packed.read_params(store, [path]).values()
        wanted = original[huggingface.hf_name(path)]
        wanted = wanted.T if huggingface.is_transposed(path) else wanted
        assert found.dtype == ml_dtypes.bfloat16
        assert np.ascontiguousarray(wanted).tobytes() == found.tobytes()
        count += 1
    assert count == len(original) - 3  # the embedding is there four times


def all_sparse(pack: pathlib.Path, folder: pathlib.Path) -> np.ndarray:
    """A pack as that of c-2048: the two sparse blocks alone, logits of their own."""
    folder.mkdir()
    renamed, sizes, logits = {}, {}, None
    for name, array in tensors(pack / "noexp.pt").items():
        head, _, tail = name.partition(".block.")
        block, _, rest = tail.partition(".")
        if not tail:
            renamed[name] = array
        elif "relative_attention_bias" in rest:
            renamed[f"{head}.block.0.{rest}"] = array
        elif block in "13":
            renamed[f"{head}.block.{int(block) // 2}.{rest}"] = array
    logits = np.random.default_rng(0).standard_normal((512, 64)).astype(ml_dtypes.bfloat16)
    renamed["lm_head.weight"] = logits
    torch_files.write_state_dict(folder / "noexp.pt", renamed)
    for number in range(4):
        experts = {
            name.replace("block.1.", "block.0.").replace("block.3.", "block.1."): array
            for name, array in tensors(pack / f"exp{number:02d}.pt").items()
        }
        torch_files.write_state_dict(folder / f"exp{number:02d}.pt", experts)
        words = {name: a.size for name, a in experts.items() if name.endswith(".w_comp")}
        sizes |= {name.removesuffix(".w_comp"): size for name, size in words.items()}
    torch_files.write(folder / "sizes.pt", sizes, {})
    shutil.copy(pack / "config.json", folder)
    sparse = {"is_full_sparse": True, "tie_word_embeddings": False}
    set_config(folder, num_layers=2, num_decoder_layers=2, **sparse)
    return logits


def test_every_layer_sparse_and_logits_of_their_own(pack, store, tmp_path):
    logits = all_sparse(pack, tmp_path / "pack")
    found = source.open_source(imported(tmp_path / "pack", tmp_path / "out").path)
    config = found.config
    assert (config.encoder_sparse_layers, config.decoder_sparse_layers) == ((0, 1), (0, 1))
    assert not config.logits_via_embedding
    params, others = (source.all_params(s) for s in (found, source.open_source(store.path)))
    np.testing.assert_array_equal(params.pop("decoder/logits_dense/kernel"), logits.T)
    for path, array in params.items():
        same = path.replace("layers_1", "layers_3").replace("layers_0", "layers_1")
        np.testing.assert_array_equal(array, others[same], err_msg=path)


def test_one_expert_may_be_in_every_group_or_all_in_one(pack, store, tmp_path):
    one = imported(pack, tmp_path / "one", experts_per_group=100)
    assert [len(groups) for groups in one.groups.values()] == [1] * 4
    assert [len(groups) for groups in store.groups.values()] == [3] * 4
    with pytest.raises(ValueError, match="EXPERTS_PER_GROUP is 0"):
        run_import(pack, tmp_path / "none", experts_per_group=0)


def refused(folder: pathlib.Path, *words: str) -> None:
    """One clear error, and no store that looks finished."""
    output = folder.parent / "out"
    with pytest.raises(CheckpointError) as caught:
        run_import(folder, output)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (output / packed.MANIFEST).exists()


@pytest.mark.parametrize("name", ["exp02.pt", "exp03.pt", "noexp.pt", "sizes.pt", "config.json"])
def test_a_missing_file_is_named(name, copy):
    (copy / name).unlink()
    refused(copy, name)


def test_a_file_too_many_is_named(copy):
    shutil.copy(copy / "exp03.pt", copy / "exp04.pt")
    refused(copy, "exp04.pt is one too many", "exp00.pt to exp03.pt")


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({FIRST: 891}, ("exp00.pt", f"{FIRST}.w_comp", "(891,) (sizes.pt)", "int16 (892,)")),
        ({FIRST: -1}, ("sizes.pt is no list of word counts",)),
        ({FIRST: None}, ("sizes.pt is no list of word counts",)),
        ({"encoder.block.9.wi": 3}, ("sizes.pt has `encoder.block.9.wi`",)),
        ("cut", ("sizes.pt lacks `",)),
    ],
)
def test_wrong_sizes(sizes, words, copy):
    found = torch_pickle.read_object(torch_pickle.open_archive(copy / "sizes.pt"))
    found = dict(list(found.items())[:-1]) if sizes == "cut" else found | sizes
    torch_files.write(copy / "sizes.pt", found, {})
    refused(copy, *words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"d_ff": 96}, (f"{FIRST}.row_off", "expected int32 (97,) (config.json)", "(129,)")),
        ({"d_ff": "wide"}, ("`d_ff` is wide",)),
        ({"num_layers": 5}, ("`num_layers` is 5, but noexp.pt is of 4",)),
        ({"num_experts": 16}, ("`num_experts` is 16",)),
        ({"is_full_sparse": True}, ("routers for 4 of 8",)),
        ({"feed_forward_proj": "gated-gelu"}, ("`feed_forward_proj` is gated-gelu",)),
        ({"model_type": "t5"}, ("`model_type` is t5",)),
    ],
)
def test_a_configuration_of_another_model(settings, words, copy):
    set_config(copy, **settings)
    refused(copy, *words)


def offsets(first: int, step: int) -> np.ndarray:
    return (first + step * np.arange(129)).astype(np.int32)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"row_off": offsets(0, 7)}, ("must end at the 892 words", "got")),
        ({"row_off": offsets(-128, 1)}, ("must not be negative",)),
        ({"row_off": np.append(offsets(0, 0)[:-1], np.int32(892))}, ("rise by at least one word",)),
        (
            {"row_off": np.append(offsets(0, 1000)[:-1], np.int32(892))},
            ("must begin at 0 and rise",),
        ),
        ({"w_comp": np.zeros(892, np.int16)}, ("words expand to", "expected 64")),
        ({"ter_minmax": np.full(256, np.nan, ml_dtypes.bfloat16)}, ("are not finite",)),
        ({"w_comp": np.zeros(892, np.int32)}, ("expected int16 (892,)", "found int32")),
        ({"row_off": None}, (f"{FIRST}.row_off", "found no tensor")),
        ({"bias": np.zeros(3, np.float32)}, (f"holds `{FIRST}.bias`",)),
        ({"weight": None, "row_off": offsets(0, 7)}, ("must end at the 892 words",)),
    ],
)
def test_damaged_experts(arrays, words, copy):
    change(copy / "exp00.pt", **arrays)
    refused(copy, "exp00.pt", FIRST, *words)


def test_a_flipped_bit_shows_in_the_checksum(copy):
    content = bytearray((copy / "exp03.pt").read_bytes())
    last = tensors(copy / "exp03.pt")[
        f"{FIRST}.ter_minmax".replace("encoder.block.1.layer.1", "decoder.block.3.layer.2")
    ]
    content[content.index(last.tobytes()) + 1] ^= 1
    (copy / "exp03.pt").write_bytes(content)
    refused(copy, "exp03.pt", "does not match its checksum")


def test_parameters_that_are_not_finite_or_missing(copy):
    name = "decoder.block.2.layer.1.EncDecAttention.k.weight"
    params = tensors(copy / "noexp.pt")
    torch_files.write_state_dict(
        copy / "noexp.pt", params | {name: np.full((64, 64), np.inf, ml_dtypes.bfloat16)}
    )
    refused(copy, "noexp.pt", name, "NaN or infinity")
    shutil.rmtree(copy.parent / "out")
    del params[name]
    torch_files.write_state_dict(copy / "noexp.pt", params)
    refused(copy, "noexp.pt", "decoder/layers_2/encoder_decoder_attention/key/kernel")


def test_a_folder_that_is_not_free(pack, store):
    with pytest.raises(CheckpointError, match="finished packed checkpoint: choose a new"):
        run_import(pack, store.path)


def test_other_readers_say_what_to_do(pack):
    with pytest.raises(CheckpointError, match="import it first"):
        source.open_source(pack)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_edited_bytes_are_read_or_refused(pack, tmp_path_factory, data):
    """Any bytes of one layer's file: the same words, or a CheckpointError."""
    name = data.draw(st.sampled_from(["exp01.pt", "sizes.pt"]))
    content = bytearray((pack / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("edited") / "pack"
    folder.mkdir()
    for path in pack.iterdir():
        if path.name != name:
            (folder / path.name).symlink_to(path)
    (folder / name).write_bytes(content)
    try:
        checkpoint = published.open_checkpoint(folder)
        ((start, experts),) = published.read_groups(checkpoint, 1, 8)
    except CheckpointError:
        return
    assert start == 0
    ((_, wanted),) = published.read_groups(published.open_checkpoint(pack), 1, 8)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), experts, wanted))
