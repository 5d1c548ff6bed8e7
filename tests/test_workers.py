# SPDX-License-Identifier: Apache-2.0
"""Several devices: each its share, the same bytes as one device alone."""

import io
import json
import threading

import jax
import many_devices
import pytest
import rich.console

from qmoe_jax.calibration.text import Text
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.runs import compress, groups, resume, workers

DEVICES = 8


@pytest.mark.slow
def test_on_eight_devices():
    many_devices.run_again(__file__, DEVICES)


@pytest.fixture
def devices():
    return many_devices.first(DEVICES)


def run(data_dir, output, number, experts_per_group: int | None = 1):
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
        compute=compress.Compute(experts_per_group=experts_per_group, batch_tokens=128),
        num_devices=number,
        num_samples=32,
        num_validation_samples=8,
        compare_round_to_nearest=True,
        console=rich.console.Console(file=io.StringIO()),
    )


def result(output, report):
    assert not (output / resume.FOLDER).exists()
    files = {str(f.relative_to(output)): f.read_bytes() for f in output.rglob("*.bin")}
    layers = [{**vars(layer), "seconds": 0} for layer in report.layers]
    return files, report.losses, report.standard_errors, layers


@pytest.fixture(scope="module")
def alone(data_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "out"
    return result(output, run(data_dir, output, 1))


def test_many_devices_give_the_bytes_of_one(devices, data_dir, alone, tmp_path):
    report = run(data_dir, tmp_path / "out", DEVICES)
    assert result(tmp_path / "out", report) == alone
    trace = json.loads((tmp_path / "out/timeline.json").read_text())["traceEvents"]
    names = {event["args"]["name"] for event in trace if event["ph"] == "M"}
    assert {f"device {place}" for place in range(DEVICES)} <= names


@pytest.mark.parametrize(("first", "then"), [(DEVICES, 1), (1, 3)])
def test_a_stopped_run_goes_on_with_other_devices(
    devices, first, then, data_dir, alone, tmp_path, monkeypatch
):
    solve, solved = groups.solve, []

    def stopping(*arguments):
        if (arguments[2].stack, arguments[3]) == ("encoder", 3):
            solved.append(arguments[5].start)
            if len(solved) > 3:
                raise KeyboardInterrupt
        return solve(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(groups, "solve", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(data_dir, tmp_path / "out", first)
    assert result(tmp_path / "out", run(data_dir, tmp_path / "out", then)) == alone


def test_a_share_of_the_experts_is_a_group_at_most(devices, data_dir, tmp_path):
    report = run(data_dir, tmp_path / "out", 4, experts_per_group=None)
    files = sorted(file.name for file in (tmp_path / "out/experts").glob("encoder.layers_1.*"))
    assert [name.split(".")[2] for name in files] == [
        "0000-0001",
        "0002-0003",
        "0004-0005",
        "0006-0007",
    ]
    assert report.machine["halved_groups"] == []


def test_one_that_fails_stops_the_others(devices):
    ended, all_begun = [], threading.Barrier(DEVICES)

    def work(worker):
        assert jax.numpy.zeros(()).devices() == {worker.device}
        all_begun.wait()
        if worker.place == 5:
            raise CheckpointError("number 5")
        assert worker.stopped.wait(60)
        ended.append(worker.place)

    with pytest.raises(CheckpointError, match="number 5"):
        workers.on_each(devices, work)
    assert sorted(ended) == [0, 1, 2, 3, 4, 6, 7]


def test_an_interrupt_ends_loops_over_shares(devices, monkeypatch):
    """Ctrl-C comes in the main thread, while the others are at work."""
    begun, done = threading.Barrier(DEVICES + 1), []

    def interrupted(*arguments, **options):
        begun.wait()
        raise KeyboardInterrupt

    def work(worker):
        for place, item in enumerate(worker.share(range(DEVICES * 1000))):
            if place == 0:
                begun.wait()
                assert worker.stopped.wait(60)
            done.append(item)

    monkeypatch.setattr(workers, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        workers.on_each(devices, work)
    assert sorted(done) == list(range(DEVICES))


def test_shares_are_all_of_it(devices):
    shares = workers.on_each(devices, lambda worker: worker.share(range(19)))
    assert sorted(item for share in shares for item in share) == list(range(19))
    assert [len(share) for share in shares] == [3, 3, 3, 2, 2, 2, 2, 2]


def test_one_device_needs_no_thread():
    (found,) = workers.on_each(jax.devices()[:1], lambda worker: threading.current_thread())
    assert found is threading.current_thread()


def test_so_many_devices_must_be_there(data_dir, tmp_path):
    with pytest.raises(ValueError, match="NUM_DEVICES is 99; expected 1 to"):
        run(data_dir, tmp_path / "out", 99)
