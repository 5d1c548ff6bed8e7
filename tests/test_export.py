# SPDX-License-Identifier: Apache-2.0
"""The run mode: a compressed model leaves in three forms, and is the same model in each."""

import collections
import io
import resource
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
import tiny_stores
import tiny_switch
from flax.traverse_util import unflatten_dict

from qmoe_jax.checkpoints import huggingface_writer, packed, published, published_import, source
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.models.switch import Switch
from qmoe_jax.runs import import_pack
from qmoe_jax.runs.export import export


@pytest.fixture(scope="module")
def store(data_dir, tmp_path_factory):
    """A ternary model of eight experts in each of four layers."""
    folder = tmp_path_factory.mktemp("export") / "store"
    pack = published.open_checkpoint(data_dir / "qmoe" / "tiny_qmoe_ckpt")
    published_import.import_checkpoint(pack, folder, experts_per_group=3)
    return folder


@pytest.fixture(scope="module")
def logits(store):
    """A function of parameters; compiled once."""
    apply = tiny_switch.quick_jit(Switch(source.open_source(store).config).apply)
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 90, (3, 2, 12)), jnp.int32)

    def of(params):
        tree = {path: jnp.asarray(array, jnp.float32) for path, array in params.items()}
        return np.asarray(apply({"params": unflatten_dict(tree, sep="/")}, *tokens))

    return of


def exported(store, folder, form, **options) -> str:
    text = io.StringIO()
    console = rich.console.Console(file=text, width=200)
    export(str(store), str(folder), form, console=console, **options)
    return text.getvalue()


@pytest.mark.parametrize("form", ["t5x", "huggingface", "orbax", "packed"])
def test_the_model_is_the_same_in_every_form(form, store, logits, tmp_path):
    codec = {"export_codec": "tunstall"} if form == "packed" else {}
    said = exported(store, tmp_path / "out", form, **codec)
    assert "encoder" in said and ("100% done" in said or form == "orbax")
    back = tmp_path / "out"
    if form == "orbax":
        back = tmp_path / "back"
        import_pack.import_pack(str(tmp_path / "out"), str(back), console=quiet())
    expected = source.all_params(source.open_source(store))
    found = source.all_params(source.open_source(back))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        dtype = array.dtype if form in ("orbax", "packed") else np.float32
        np.testing.assert_array_equal(found[name], array.astype(dtype), strict=True, err_msg=name)
    np.testing.assert_array_equal(logits(found), logits(expected), strict=True)


def quiet() -> rich.console.Console:
    return rich.console.Console(file=io.StringIO())


@pytest.mark.parametrize("form", ["t5x", "huggingface"])
def test_bfloat16_is_the_cast(form, tmp_path):
    original = tiny_switch.DATA / "tiny_switch_base" / "legacy"
    exported(original, tmp_path / "out", form, export_dtype="bfloat16", max_shard_bytes=400_000)
    found = source.all_params(source.open_source(tmp_path / "out"))
    for name, array in tiny_switch.flat_params("tiny_switch_base").items():
        np.testing.assert_array_equal(found[name], array.astype(jnp.bfloat16), strict=True)
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert (len(shards) > 1) == (form == "huggingface")


def test_the_other_codec_takes_fewer_bytes_and_converts_back(store, tmp_path):
    exported(store, tmp_path / "b", "packed", export_codec="tunstall")
    exported(tmp_path / "b", tmp_path / "c", "packed", export_codec="qmoe")
    one, two, three = (
        {path.name: path.read_bytes() for path in folder.glob("experts/*")}
        for folder in (store, tmp_path / "b", tmp_path / "c")
    )
    assert three == one and two.keys() == one.keys()
    assert sum(map(len, two.values())) < 0.97 * sum(map(len, one.values()))


@pytest.mark.parametrize("form", ["t5x", "huggingface", "orbax", "packed"])
def test_dry_run_writes_nothing(form, store, tmp_path):
    codec = {"export_codec": "tunstall"} if form == "packed" else {}
    said = exported(store, tmp_path / "a" / "out", form, dry_run=True, **codec)
    assert "bytes" in said and "nothing was written" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dry_run", [True, False])
def test_refusals_come_before_any_writing(dry_run, store, tmp_path, tmp_path_factory, monkeypatch):
    out, gated = tmp_path / "out", tiny_switch.DATA / "tiny_switch_xxl" / "legacy"

    def refused(message, *arguments, error: type[Exception] = CheckpointError, **options):
        with pytest.raises(error, match=message):
            exported(*arguments, dry_run=dry_run, **options)

    refused("gated experts, which Hugging Face", gated, out, "huggingface")
    refused("no packed checkpoint, which is what EXPORT_FORMAT orbax", gated, out, "orbax")
    refused(
        "EXPORT_DTYPE is 'bfloat16', but",
        store,
        out,
        "orbax",
        export_dtype="bfloat16",
        error=ValueError,
    )
    for form, codec, message in (
        ("packed", None, "EXPORT_CODEC is None with EXPORT_FORMAT 'packed': give the one of"),
        ("orbax", "qmoe", "EXPORT_CODEC is 'qmoe' with EXPORT_FORMAT 'orbax'"),
    ):
        refused(message, store, out, form, export_codec=codec, error=ValueError)
    uniform = tmp_path_factory.mktemp("uniform") / "store"
    tiny_stores.write(uniform, tiny_stores.Kind("uniform", 3))
    refused("is of codec 'uniform'", uniform, out, "packed", export_codec="tunstall")
    refused("is no packed checkpoint", gated, out, "packed", export_codec="qmoe")
    refused("MAX_SHARD_BYTES is 0", store, out, "huggingface", max_shard_bytes=0, error=ValueError)
    refused("cannot write to gs://bucket/x", store, "gs://bucket/x", "huggingface")
    refused("cannot write to gs://bucket/x", store, "gs://bucket/x", "orbax")
    refused("cannot write to gs://bucket/x", store, "gs://bucket/x", "t5x")
    (tmp_path / "taken").mkdir()
    refused("taken exists already", store, tmp_path / "taken", "huggingface")
    refused("taken exists already", store, tmp_path / "taken", "orbax")
    (tmp_path / "taken" / "checkpoint_0").mkdir()
    refused("checkpoint_0 exists already", store, tmp_path / "taken", "t5x")
    usage = collections.namedtuple("usage", "free")(999)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(r"out would take [\d,]{7,} bytes, and its disk has 999 free", store, out, "huggingface")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.fixture
def files_of_20_kb():
    """No file may grow larger, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("form", ["t5x", "huggingface", "orbax"])
def test_full_disk_leaves_nothing(form, store, tmp_path, files_of_20_kb):
    with pytest.raises(CheckpointError, match=r"cannot (be )?writ.*File too large"):
        exported(store, tmp_path / "out" if form != "t5x" else tmp_path, form)
    assert not list(tmp_path.iterdir())


def test_size_said_is_the_size_written(store, tmp_path):
    config = source.open_source(store).config
    exported(store, tmp_path / "out", "huggingface", export_dtype="bfloat16")
    header = 60_000  # of names
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 0 < size - huggingface_writer.nbytes(config, "bfloat16") < header


def test_import_of_what_was_exported(store, tmp_path):
    exported(store, tmp_path / "orbax", "orbax")
    (tmp_path / "orbax" / "config.gin").write_text("")  # as the command line leaves it there
    import_pack.import_pack(
        str(tmp_path / "orbax"), str(tmp_path / "back"), dry_run=True, console=quiet()
    )
    assert not (tmp_path / "back").exists()
    text = io.StringIO()
    console = rich.console.Console(file=text, width=200)
    import_pack.import_pack(str(tmp_path / "orbax"), str(tmp_path / "back"), console=console)
    assert "decoder block 4, 8 experts" in text.getvalue()
    manifests = [(folder / packed.MANIFEST).read_bytes() for folder in (store, tmp_path / "back")]
    assert manifests[0] == manifests[1]
    shutil.rmtree(tmp_path / "orbax" / "d")
    with pytest.raises(CheckpointError, match="incomplete or damaged"):
        import_pack.import_pack(str(tmp_path / "orbax"), str(tmp_path / "other"), dry_run=True)
