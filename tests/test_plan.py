# SPDX-License-Identifier: Apache-2.0
"""What a run will need: on paper for the released models, against small real runs."""

import dataclasses
import io
import pathlib
import re

import gin
import pytest
import rich.console

from qmoe_jax import main
from qmoe_jax.calibration import buffers
from qmoe_jax.calibration.text import Text
from qmoe_jax.checkpoints import source
from qmoe_jax.models.config import STACKS, Stack, SwitchConfig
from qmoe_jax.runs import compress, devices, machine, needs, plan, rehearsal
from qmoe_jax.runs.machine import Machine
from qmoe_jax.runs.plan import Described

MODELS = sorted(p.stem for p in pathlib.Path("t5x_configs/models").glob("switch_*_*.gin"))
A100 = Described(device_memory=80 * 10**9, host_memory=512 * 10**9, disk=4 * 10**12)
QUIET = {"measure": False, "compute": compress.Compute(activation_dtype="bfloat16")}


def released(name) -> SwitchConfig:
    gin.clear_config()
    gin.parse_config_file(f"t5x_configs/models/{name}.gin")
    config = gin.query_parameter("%MODEL").scoped_configurable_fn()
    gin.clear_config()
    return config


def quietly(*arguments, **options):
    out = io.StringIO()
    console = rich.console.Console(file=out, width=200)
    return plan.plan(*arguments, console=console, **options), out.getvalue()


@pytest.mark.parametrize("name", MODELS)
def test_every_released_model_is_planned(name):
    made, printed = quietly(model=released(name), described=A100, **QUIET)
    assert printed.startswith("it fits")
    assert made.lacking == []
    needed = made.needs
    assert max(needed.device.values()) < 60 * 10**9  # of 80, three quarters are JAX's
    weights = needs.expert_weights(made.config)
    assert 0.7 < 8 * needed.output["packed experts"] / weights < 0.9
    assert made.how.mapped == (name in ("switch_c_2048",))


def test_switch_c_in_numbers():
    made, printed = quietly(model=released("switch_c_2048"), described=A100, **QUIET)
    buffer = 2 * 2080 * 2 * ((512 + 114) * 160_000 + 2 * 128 * (512 + 114))
    assert made.needs.buffers == buffer  # A and B of both stacks
    assert made.needs.read == 4 * 1_571_327_875_360
    assert 140e9 < made.needs.output["packed experts"] < 165e9
    assert made.how.group_size == 16
    assert "160,000 calibration" in printed


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"device_memory": 4 * 10**9}, "device memory: experts: .* lower EXPERTS_PER_GROUP"),
        ({"disk": 10**11}, "disk at OUTPUT_DIR: .* 100.00 GB there"),
        ({"host_memory": 10**9, "disk": 10**12}, "host memory: .* needed .activation buffers 68"),
    ],
)
def test_what_does_not_fit_is_said_with_numbers(changed, said):
    described = dataclasses.replace(A100, **changed)
    options = QUIET | {
        "compute": compress.Compute(activation_dtype="bfloat16", experts_per_group=16)
    }
    made, printed = quietly(model=released("switch_c_2048"), described=described, **options)
    assert printed.startswith("IT DOES NOT FIT")
    assert any(re.match(said, line) for line in made.lacking), made.lacking


def test_buffers_are_those_that_a_run_makes(monkeypatch, data_dir, tmp_path):
    made, create = [], buffers.create

    def counted(*arguments):
        made.append(create(*arguments))
        return made[-1]

    monkeypatch.setattr(buffers, "create", counted)
    report = small_run(data_dir, tmp_path / "out", compute=compress.Compute())
    samples = report.samples
    tokens: list[dict[Stack, int]] = [
        {stack: samples[name][f"{stack}_tokens"] for stack in STACKS}
        for name in ("calibration", "validation")
    ]
    work = needs.Work(tokens[0], tokens[1], versions=2)
    sizes = {s: 4 * 64 * work.tokens(s) for s in STACKS}
    assert sum(buffer.data.nbytes for buffer in made) == 2 * sum(sizes.values())


def small_run(data_dir, output, **options):
    demo = data_dir / "text"
    text = Text(
        sentencepiece_model_file=str(demo / "sentencepiece.model"),
        files=str(demo / "calibration.jsonl"),
        validation_files=str(demo / "heldout.jsonl"),
        task_feature_lengths={"inputs": 64},
        document_mode="split",
    )
    return compress.compress(
        str(data_dir / "t5x/tiny_switch_base/legacy"),
        str(output),
        text,
        num_samples=16,
        num_validation_samples=4,
        console=rich.console.Console(file=io.StringIO()),
        **options,
    )


def test_a_run_that_cannot_fit_is_refused_before_anything_is_written(
    data_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(machine, "host_memory", lambda: 100_000)
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=r"this does not fit\. host memory: .* BUFFER_DIR"):
            small_run(data_dir, tmp_path / "out", dry_run=dry_run)
    assert not (tmp_path / "out").exists()


def test_measured_time_is_of_all_phases(data_dir, monkeypatch):
    monkeypatch.setattr(rehearsal, "OPERATIONS", 1e9)
    path = str(data_dir / "t5x/tiny_switch_base/legacy")
    made, printed = quietly(path, num_samples=64, inputs_length=64)
    assert {"dense part", "Hessians", "solve", "expert forward", "losses", "all"} <= set(
        made.seconds
    )
    assert made.seconds["all"] >= made.seconds["solve"]
    assert made.seconds["reading, beside the rest"] > 0
    assert "the run" in printed


@pytest.mark.parametrize("memory", [2.0e9, 3.0e9])
def test_settings_are_chosen_that_fit(memory):
    """JAX's three quarters hold neither the default batch nor, of the smaller, the group."""
    described = dataclasses.replace(A100, device_memory=int(memory))
    made, printed = quietly(model=released("switch_base_8"), described=described, **QUIET)
    assert made.lacking == []
    assert 512 <= made.how.batch_tokens < devices.BATCH_TOKENS
    assert re.search(rf"BATCH_TOKENS +│ {made.how.batch_tokens:,}", printed)
    given = QUIET | {
        "compute": compress.Compute(activation_dtype="bfloat16", batch_tokens=devices.BATCH_TOKENS)
    }
    made, printed = quietly(model=released("switch_base_8"), described=described, **given)
    assert printed.startswith("IT DOES NOT FIT")
    assert any("lower BATCH_TOKENS" in line for line in made.lacking)


def test_reading_is_measured_by_whole_chunks(data_dir):
    """The first of one expert would take as long as all that its chunks hold."""
    opened = source.open_source(data_dir / "t5x/tiny_switch_base/legacy")
    sizes = []

    def expert_groups(stack, layer, group_size, start=0):
        sizes.append(group_size)
        return opened.expert_groups(stack, layer, group_size, start)

    watched = dataclasses.replace(opened, expert_groups=expert_groups)
    assert rehearsal.read_rate(watched)
    assert sizes == [opened.chunk_room().experts]


def test_a_rehearsal_that_fails_is_told(monkeypatch, data_dir):
    def fail(*arguments, **options):
        raise ValueError("this does not fit")

    monkeypatch.setattr(rehearsal, "rehearse", fail)
    path = str(data_dir / "t5x/tiny_switch_base/legacy")
    made, printed = quietly(path, num_samples=64, inputs_length=64)
    assert made.seconds == {}
    assert "could not be run: this does not fit" in printed
    assert "Memory and disk" in printed


def test_folders_that_are_not_there_yet_are_not_made(data_dir, tmp_path):
    path = str(data_dir / "t5x/tiny_switch_base/legacy")
    compute = compress.Compute(
        buffer_dir=str(tmp_path / "buffers"), scratch_dir=str(tmp_path / "scratch")
    )
    made, _ = quietly(path, num_samples=64, inputs_length=64, compute=compute)
    assert made.seconds["all"] > 0
    assert not list(tmp_path.iterdir())


def test_blocks_that_are_cut_anew_are_not_read_for_a_rate(data_dir, monkeypatch):
    """With no room in memory for a block of chunks, all of it would go to disk first."""
    monkeypatch.setattr(rehearsal, "read_rate", lambda source: pytest.fail("read"))
    path = str(data_dir / "t5x/tiny_switch_base/legacy")
    compute = compress.Compute(read_budget=1000)
    made, _ = quietly(path, num_samples=64, inputs_length=64, compute=compute)
    assert made.needs.scratch > 0
    assert made.seconds["reading, beside the rest"] == 0


@pytest.mark.parametrize(
    ("own", "file"),
    [
        ("0::/\n", "memory.max"),
        ("0::/system.slice/job_7\n", "system.slice/job_7/memory.max"),
        ("0::/system.slice/job_7\n", "system.slice/memory.max"),
        ("4:cpu:/x\n9:memory:/docker/a\n", "memory/memory.limit_in_bytes"),
        ("9:cpu,memory:/slurm/job\n", "memory/slurm/memory.limit_in_bytes"),
    ],
)
def test_memory_of_the_machine_is_found(own, file, monkeypatch, tmp_path):
    """Of a container or a job, which lies deeper, the smallest limit."""
    found = machine.host_memory()
    assert found is not None and found > 10**8
    (tmp_path / "own").write_text(own)
    limit = tmp_path / "groups" / file
    limit.parent.mkdir(parents=True)
    limit.write_text("12345\n")
    monkeypatch.setattr(machine, "OWN_CGROUPS", str(tmp_path / "own"))
    monkeypatch.setattr(machine, "CGROUPS", str(tmp_path / "groups"))
    assert machine.host_memory() == 12345
    limit.write_text("max\n")
    assert (machine.host_memory() or 0) > 10**8
    assert machine.free_disk(str(tmp_path / "not" / "yet" / "there")) > 0


def test_one_of_checkpoint_and_model(data_dir):
    with pytest.raises(ValueError, match="either CHECKPOINT_PATH or a model"):
        quietly()


def test_command_line(capsys):
    files = ["t5x_configs/models/switch_base_8.gin", "t5x_configs/runs/plan.gin"]
    flags = [*(f"--gin_file={file}" for file in files), "--gin.plan.model=%MODEL", "--dry_run"]
    code = main.main(["", "--run_mode=plan", *flags])
    assert code == 0
    assert "EXPERTS_PER_GROUP" in capsys.readouterr().out


def test_what_lies_on_one_disk_is_added_up():
    made, _ = quietly(
        model=released("switch_c_2048"), described=Described(disk=900 * 10**9), **QUIET
    )
    assert made.how.mapped is False  # buffers on that disk would not fit either
    needed = dataclasses.replace(made.needs, buffers=800 * 10**9)
    (found,) = [text for text in needs.lacking(needed, made.machine) if text.startswith("disk")]
    assert found.startswith("disk at OUTPUT_DIR and BUFFER_DIR: ")
    apart = dataclasses.replace(made.machine, disks={})
    assert not any(text.startswith("disk") for text in needs.lacking(needed, apart))


def test_another_machine_may_have_more_devices():
    options = {"model": released("switch_base_8"), "num_devices": 8, **QUIET}
    made, _ = quietly(described=Described(device_memory=80 * 10**9), **options)
    assert made.machine.num_devices == 8
    with pytest.raises(ValueError, match="8"):
        quietly(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_validation_samples": -5}, "NUM_VALIDATION_SAMPLES is -5; expected 0 or more"),
        ({"described": Described(device_memory=-1)}, "DEVICE_MEMORY is -1; expected bytes"),
        ({"described": Described(disk=0)}, "DISK is 0; expected bytes, 1 or more"),
    ],
)
def test_numbers_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        quietly(model=released("switch_base_8"), **QUIET, **options)


def test_shared_memory_counts_twice():
    made, _ = quietly(model=released("switch_base_8"), num_samples=64, **QUIET)
    small = Machine("cpu", 1, None, 2 * 10**9, 10**12)
    assert needs.lacking(made.needs, small)[0].startswith("host memory")
