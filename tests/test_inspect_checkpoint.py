# SPDX-License-Identifier: Apache-2.0
import dataclasses
import io
import math
import shutil

import numpy as np
import pytest
import rich.console
import tiny_stores
import tiny_switch
from tiny_stores import Kind

from qmoe_jax.checkpoints import (
    array_files,
    huggingface_writer,
    orbax_pack_writer,
    published,
    published_import,
    source,
    t5x,
)
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.models import config as configs
from qmoe_jax.runs import inspect_checkpoint


def shown(path, **options) -> str:
    text = io.StringIO()
    console = rich.console.Console(file=text, width=200)
    inspect_checkpoint.inspect_checkpoint(str(path), console=console, **options)
    return text.getvalue()


def shapes_and_bytes(description):
    """Of all arrays, which must be those of the model, each once."""
    found = {array.name: array.shape for array in description.arrays}
    assert len(found) == len(description.arrays)
    assert found == configs.param_shapes(description.config)
    return sum(array.nbytes for array in description.arrays)


@pytest.fixture
def no_reads(monkeypatch):
    """Whoever reads a parameter fails."""

    def read(*_, **__):
        raise AssertionError("a parameter was read")

    monkeypatch.setattr(array_files, "read_array", read)
    monkeypatch.setattr(t5x, "read_many", read)
    monkeypatch.setattr(published, "read_groups", read)


@pytest.mark.parametrize("name", tiny_switch.MODELS)
def test_t5x(name, no_reads):
    folder = tiny_switch.DATA / name / "legacy"
    found = inspect_checkpoint.describe(folder)
    opened = source.open_source(folder)
    assert (found.format, found.step, found.config) == ("t5x", opened.step, opened.config)
    assert shapes_and_bytes(found) == found.nbytes == opened.nbytes
    chunks = {
        a.name: " x ".join(map(str, t5x.chunk_shape(t5x.open_checkpoint(folder), a.name)))
        for a in found.experts
    }
    assert chunks
    assert all(array.pieces == f"in chunks of {chunks[array.name]}" for array in found.experts)
    bits = 16 if name == "tiny_switch_c" else 32
    text = shown(folder)
    assert f"{opened.step:,}" in text and f"{bits}.000" in text
    assert f"{sum(map(math.prod, configs.param_shapes(found.config).values())):,}" in text


def test_of_several_steps_the_newest_is_taken_and_printed_whole(tmp_path):
    folder = tmp_path / ("a_long_name_" * 9)
    for step in (9, 10):
        original = tiny_switch.DATA / "tiny_switch_base" / "legacy" / "checkpoint_500100"
        shutil.copytree(original, folder / f"checkpoint_{step}")
    text = io.StringIO()
    console = rich.console.Console(file=text, width=80)
    found = inspect_checkpoint.inspect_checkpoint(str(folder), console=console)
    assert found.path == f"{folder}/checkpoint_10"
    assert found.path in text.getvalue().splitlines()


@pytest.mark.parametrize(
    "kind", [Kind("qmoe"), Kind("tunstall"), Kind("uniform", 3, 32), Kind("dense")]
)
def test_packed(kind, tmp_path, no_reads):
    store = tiny_stores.write(tmp_path / "store", kind)
    found = inspect_checkpoint.describe(tmp_path / "store")
    assert (found.format, found.step, found.nbytes) == ("packed", 7, store.nbytes)
    assert shapes_and_bytes(found) <= found.nbytes
    assert {array.dtype for array in found.experts} == {kind.codec}
    assert found.provenance["settings"]["quantizer"]["bits"] == kind.bits
    text = shown(tmp_path / "store", list_parameters=True)
    assert "2 files of up to 2 experts" in text and "source: step" in text
    assert all(array.name in text for array in found.arrays)


def test_bits_per_expert_weight_count_codes_lengths_and_values(tmp_path):
    store = tiny_stores.write(tmp_path / "store", Kind("qmoe"))
    found = inspect_checkpoint.describe(tmp_path / "store")
    stored = sum(
        entry.nbytes
        for groups in store.groups.values()
        for group in groups
        for entry in group.file.arrays.values()
    )
    assert sum(array.nbytes for array in found.experts) == stored
    weights = sum(math.prod(array.shape) for array in found.experts)
    assert f"{8 * stored / weights:.3f}" in shown(tmp_path / "store")


def test_published_pack_and_what_it_becomes(data_dir, tmp_path):
    pack = data_dir / "qmoe" / "tiny_qmoe_ckpt"
    found = inspect_checkpoint.describe(pack)
    assert (found.format, found.step) == ("published", None)
    assert shapes_and_bytes(found) <= found.nbytes
    published_import.import_checkpoint(published.open_checkpoint(pack), tmp_path / "out")
    after = inspect_checkpoint.describe(tmp_path / "out")
    assert after.config == found.config
    assert after.provenance["source"]["format"] == "published"
    # A row's offset of 4 bytes becomes its length of 2; the one past the end is gone.
    saved = sum(2 * math.prod((a.shape[0], a.shape[2])) + 4 * a.shape[0] for a in found.experts)
    stored = [sum(array.nbytes for array in d.experts) for d in (found, after)]
    assert stored[0] - saved == stored[1]


@pytest.mark.parametrize("kind", [Kind("qmoe"), Kind("uniform", 3, 32), Kind("dense")])
def test_orbax(kind, tmp_path):
    """What is said of it is what is said of the packed checkpoint that it holds."""
    store = tiny_stores.write(tmp_path / "store", kind)
    orbax_pack_writer.save(tmp_path / "orbax", store)
    before = inspect_checkpoint.describe(tmp_path / "store")
    found = inspect_checkpoint.describe(tmp_path / "orbax")
    assert (found.format, found.path) == ("orbax", str(tmp_path / "orbax"))
    assert [dataclasses.replace(array, pieces="") for array in found.arrays] == [
        dataclasses.replace(array, pieces="") for array in before.arrays
    ]
    assert (found.config, found.step, found.nbytes) == (before.config, 7, store.nbytes)
    assert found.provenance == before.provenance
    text = shown(tmp_path / "orbax")
    assert "one array a layer" in text and "source: step" in text


def test_hugging_face(tmp_path):
    original = source.open_source(tiny_switch.DATA / "tiny_switch_base" / "legacy")
    huggingface_writer.save(tmp_path / "hf", original, "float32")
    found = inspect_checkpoint.describe(tmp_path / "hf")
    assert (found.format, found.step) == ("huggingface", None)
    assert shapes_and_bytes(found) == found.nbytes
    assert "one tensor an expert" in shown(tmp_path / "hf")


def test_no_checkpoint(tmp_path):
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(CheckpointError, match="holds neither a T5X checkpoint"):
        inspect_checkpoint.describe(tmp_path)
