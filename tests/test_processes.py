# SPDX-License-Identifier: Apache-2.0
"""Real processes on one machine: the bytes of one, and of another number after a crash."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from qmoe_jax.checkpoints import packed
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.runs import processes, resume
from qmoe_jax.runs.processes import Processes

SCRIPT = pathlib.Path(__file__).with_name("process_run.py")
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


PROBE = """
import sys
import jax
from jax.experimental import multihost_utils
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
multihost_utils.sync_global_devices("probe")
"""


@pytest.fixture(scope="module")
def network():
    """Skips where JAX's own processes cannot reach each other: the host's name must resolve."""
    address = f"localhost:{free_port()}"
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    begun = [
        subprocess.Popen(
            [sys.executable, "-c", PROBE, address, str(index)], env=env, stderr=subprocess.PIPE
        )
        for index in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in begun]
    except subprocess.TimeoutExpired:
        said = [b"no answer within 120 s"]
    for process in begun:
        process.kill()
        process.wait()
    if any(process.returncode for process in begun):
        pytest.skip(f"JAX's processes do not find each other here: {said[0][-300:]!r}")


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def settings(data_dir, output):
    demo = data_dir / "text"
    values = {
        "CHECKPOINT_PATH": str(data_dir / "t5x/tiny_switch_base/legacy"),
        "OUTPUT_DIR": str(output),
        "SENTENCEPIECE_MODEL_FILE": str(demo / "sentencepiece.model"),
        "CALIBRATION_FILES": str(demo / "calibration.jsonl"),
        "VALIDATION_FILES": str(demo / "heldout.jsonl"),
        "TASK_FEATURE_LENGTHS": {"inputs": 64},
        "DOCUMENT_MODE": "split",
        "NUM_SAMPLES": 32,
        "NUM_VALIDATION_SAMPLES": 8,
        "COMPARE_ROUND_TO_NEAREST": True,
        "EXPERTS_PER_GROUP": 1,
        "BATCH_TOKENS": 128,
    }
    return [f"--gin.{name}={value!r}" for name, value in values.items()]


def run(data_dir, output, count, *more, stop_at="-", devices=1, last=()):
    """Return codes and standard errors of all processes; `last` are flags of the last one alone."""
    port = free_port()
    flags = f"{QUICK} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    begun = [
        subprocess.Popen(
            [
                sys.executable,
                str(SCRIPT),
                stop_at,
                f"--coordinator_address=localhost:{port}",
                f"--process_count={count}",
                f"--process_index={index}",
                *settings(data_dir, output),
                *more,
                *(last if index == count - 1 else ()),
            ],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    errors = [process.communicate(timeout=300)[1] for process in begun]
    return [process.returncode for process in begun], errors


def result(output):
    assert not (output / resume.FOLDER).exists()
    report = json.loads((output / "report.json").read_text())
    files = {str(f.relative_to(output)): f.read_bytes() for f in output.rglob("*.bin")}
    layers = [{**layer, "seconds": 0} for layer in report["layers"]]
    return files, report["losses"], report["standard_errors"], layers


@pytest.fixture(scope="module")
def alone(network, data_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "out"
    codes, errors = run(data_dir, output, 1)
    assert codes == [0], errors
    return result(output)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
def test_several_processes_give_the_bytes_of_one(count, devices, data_dir, alone, tmp_path):
    mapped = [f"--gin.BUFFER_DIR={tmp_path / 'buffers'}"] if count == 4 else []
    codes, errors = run(data_dir, tmp_path / "out", count, *mapped, devices=devices)
    assert codes == [0] * count, errors
    assert result(tmp_path / "out") == alone
    if mapped:
        assert not list((tmp_path / "buffers").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 3), (3, 1)])
def test_a_process_that_dies_ends_the_run_and_others_go_on(first, then, data_dir, alone, tmp_path):
    stop_at = json.dumps([first - 1, 20 // first])  # in the decoder
    codes, errors = run(data_dir, tmp_path / "out", first, stop_at=stop_at)
    assert codes[-1] == 9
    assert all(codes), errors
    codes, errors = run(data_dir, tmp_path / "out", then)
    assert codes == [0] * then, errors
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["machine"]["attempts"] == 2
    assert result(tmp_path / "out") == alone


@pytest.mark.slow
def test_an_error_on_one_is_told_on_all(network, data_dir, tmp_path):
    (tmp_path / "out").write_text("not a folder")
    codes, errors = run(data_dir, tmp_path / "out", 2)
    assert codes == [1, 1]
    for error in errors:
        assert "is no folder" in error


@pytest.mark.slow
def test_processes_of_different_settings_do_not_begin(network, data_dir, tmp_path):
    codes, errors = run(data_dir, tmp_path / "out", 2, last=["--gin.DAMPING=1.0"])
    assert codes == [1, 1]
    for error in errors:
        assert "processes 0 and 1 were given different settings" in error and "0.1" in error
    assert not (tmp_path / "out" / packed.JOURNAL).exists()


@pytest.mark.parametrize("place", ["before", "inside", "after", "outside"])
def test_what_fails_inside_two_steps_is_told_once(place, monkeypatch):
    """Of two processes one fails: both leave with its message, and after as many exchanges."""
    barrier, told = threading.Barrier(2, timeout=20), [None, None]
    exchanges = [0, 0]

    def gather(which, value):
        exchanges[which.index] += 1
        told[which.index] = value
        barrier.wait()
        found = list(told)
        barrier.wait()
        return found

    monkeypatch.setattr(processes, "gather", gather)

    def steps(index):
        which = Processes(index, 2)

        def fail(here):
            if (index, here) == (1, place):
                raise OSError("disk is gone")

        with processes.together(which, "outer"):
            fail("before")
            with processes.together(which, "inner"):
                fail("inside")
            fail("after")
        with processes.together(which, "next"):
            fail("outside")

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(steps, index) for index in range(2)]
        errors = [future.exception(timeout=60) for future in futures]
    assert isinstance(errors[1], OSError)
    assert isinstance(errors[0], CheckpointError)
    assert str(errors[0]).endswith("failed on process 1: disk is gone")
    assert exchanges[0] == exchanges[1]


def test_parts_are_all_of_it():
    for count in (1, 2, 3, 7):
        parts = [Processes(index, count) for index in range(count)]
        assert [i for part in parts for i in part.own(10)] == list(range(10))
        assert [part.own(10).stop for part in parts] == parts[0].bounds(10)


def test_one_process_tells_itself():
    assert processes.gather(Processes(), {"a": 1}) == [{"a": 1}]
    assert processes.here() == Processes()
    with pytest.raises(ValueError, match="no"), processes.together(Processes(), "this"):
        raise ValueError("no")
