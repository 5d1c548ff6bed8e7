# SPDX-License-Identifier: Apache-2.0
"""A compression that was stopped goes on, and ends with the bytes of one that was not."""

import collections
import contextlib
import dataclasses
import errno
import io
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import rich.console
import tiny_stores
from tiny_stores import Kind

from qmoe_jax.calibration.text import Text
from qmoe_jax.checkpoints import packed
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.quantization.quantizer import Quantizer
from qmoe_jax.runs import compress, groups, layer_experts, resume

# Every write that is to last ends in one of these.
SITES = ("fsync", "replace", "posix_fallocate")
KILLS = int(os.environ.get("QMOE_FAULT_KILLS", "2"))
EVERY = int(os.environ.get("QMOE_FAULT_EVERY", "31"))  # of the write sites


@pytest.fixture(scope="session")
def text(request):
    demo = request.config.rootpath / "tests/data/text"
    return Text(
        sentencepiece_model_file=str(demo / "sentencepiece.model"),
        files=str(demo / "calibration.jsonl"),
        validation_files=str(demo / "heldout.jsonl"),
        task_feature_lengths={"inputs": 64},
        document_mode="split",
    )


@pytest.fixture(scope="session")
def run(data_dir, text):
    def run(output, *, compute=None, console=None, **options):
        return compress.compress(
            str(data_dir / "t5x/tiny_switch_base/legacy"),
            str(output),
            options.pop("text", text),
            compute=compress.Compute(**{"experts_per_group": 3, **(compute or {})}),
            num_samples=options.pop("num_samples", 16),
            num_validation_samples=4,
            compare_round_to_nearest=True,
            console=console or rich.console.Console(file=io.StringIO()),
            **options,
        )

    return run


@pytest.fixture(scope="session")
def whole(run, tmp_path_factory):
    """The result of a run that nothing stopped."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return result(output, run(output))


def result(output, report):
    """All that must be equal: every file but those that hold times and paths."""
    assert not (output / resume.FOLDER).exists()
    files = {
        str(file.relative_to(output)): file.read_bytes()
        for file in sorted(output.rglob("*"))
        if file.is_file() and file.name not in ("report.json", "report.html", "timeline.json")
    }
    files[packed.JOURNAL] = files[packed.JOURNAL].split(b"\n", 1)[1]  # settings hold folders
    manifest = json.loads(files[packed.MANIFEST])
    files[packed.MANIFEST] = manifest | {"settings": None, "journal_crc32": None}
    layers = [{**vars(layer), "seconds": 0} for layer in report.layers]
    return files, report.losses, report.standard_errors, report.totals, layers


class Stopped(BaseException):
    """Not an error that anything catches."""


@contextlib.contextmanager
def failing(number, error):
    """Raises `error` at the write of that number, and at all later ones: the disk stays full."""
    count = 0

    def replaced(original):
        def site(*arguments):
            nonlocal count
            count += 1
            if count > number:
                raise error
            return original(*arguments)

        return site

    with pytest.MonkeyPatch.context() as patch:
        for name in SITES:
            patch.setattr(os, name, replaced(getattr(os, name)))
        yield lambda: count


def num_sites(run, output, **options):
    with failing(sys.maxsize, Stopped()) as count:
        run(output, **options)
    return count()


@pytest.mark.parametrize("mapped", [False, True], ids=["memory", "mapped"])
def test_a_full_disk_at_any_write_loses_nothing(mapped, run, whole, tmp_path):
    compute = {"buffer_dir": str(tmp_path / "buffers")} if mapped else {}
    sites = num_sites(run, tmp_path / "counted", compute=compute)
    for number in range(0, sites, EVERY):
        output = tmp_path / str(number)
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with failing(number, full), pytest.raises((CheckpointError, OSError), match="No space"):
            run(output, compute=compute)
        assert result(output, run(output, compute=compute)) == whole, f"write {number}"
    if mapped:
        assert not list((tmp_path / "buffers").iterdir())


def test_a_run_stopped_again_and_again_redoes_little(run, whole, tmp_path, monkeypatch):
    """Each attempt gets as far as one more group, and none is solved twice."""
    solved, solve = collections.Counter(), groups.solve

    def stopping(*arguments):
        block, layer, group = arguments[2], arguments[3], arguments[5]
        if any(key[:2] == (block.stack, layer) and n for key, n in attempt.items()):
            raise Stopped
        attempt[block.stack, layer, group.start] += 1
        return solve(*arguments)

    monkeypatch.setattr(groups, "solve", stopping)
    for _ in range(30):
        attempt = collections.Counter()
        try:
            report = run(tmp_path / "out")
            break
        except Stopped:
            solved += attempt
    assert result(tmp_path / "out", report) == whole
    assert report.machine["attempts"] == 9  # 4 sparse layers of 3 groups, 2 stops in each
    assert set((solved + attempt).values()) == {1}


def test_the_dense_part_runs_again_for_one_block_only(run, whole, tmp_path, monkeypatch):
    walked, run_block = [], compress.walk.run_block

    def counted(block, *arguments):
        walked.append(block.stack)
        return run_block(block, *arguments)

    def stopping(run, block, number, *arguments):
        if (block.stack, number) == ("decoder", 3):
            raise Stopped
        return compress_experts(run, block, number, *arguments)

    compress_experts = layer_experts.compress_experts
    monkeypatch.setattr(layer_experts, "compress_experts", stopping)
    with pytest.raises(Stopped):
        run(tmp_path / "out")
    monkeypatch.setattr(layer_experts, "compress_experts", compress_experts)
    monkeypatch.setattr(compress.walk, "run_block", counted)
    assert result(tmp_path / "out", run(tmp_path / "out")) == whole
    assert walked == ["decoder"] * 4  # four tracks


def stopped_at(run, output, stack, layer, patch, **options):
    """Leaves a run that was stopped when it came to the experts of a layer's second group."""
    solve = groups.solve

    def stopping(*arguments):
        if (arguments[2].stack, arguments[3]) == (stack, layer) and arguments[5].start:
            raise Stopped
        return solve(*arguments)

    with patch.context() as inner:
        inner.setattr(groups, "solve", stopping)
        with pytest.raises(Stopped):
            run(output, **options)


def test_the_output_may_move_between_attempts(run, whole, tmp_path, monkeypatch):
    stopped_at(run, tmp_path / "out", "decoder", 1, monkeypatch)
    (tmp_path / "out").rename(tmp_path / "moved")
    out = io.StringIO()
    report = run(tmp_path / "moved", console=rich.console.Console(file=out, width=200))
    assert "going on after decoder block 1 of 4" in out.getvalue()
    assert "walking" not in out.getvalue()
    assert result(tmp_path / "moved", report) == whole


def test_buffers_of_every_attempt_are_removed(run, whole, tmp_path, monkeypatch):
    """One folder for each process that there was; the last attempt has none."""
    compute = {"buffer_dir": str(tmp_path / "buffers")}
    stopped_at(run, tmp_path / "out", "encoder", 3, monkeypatch, compute=compute)
    (folder,) = (tmp_path / "buffers").iterdir()
    shutil.copytree(folder, folder.with_name(folder.name[:-1] + "1"))
    (tmp_path / "buffers" / "qmoe_jax-another-0").mkdir()
    assert result(tmp_path / "out", run(tmp_path / "out")) == whole
    assert [path.name for path in (tmp_path / "buffers").iterdir()] == ["qmoe_jax-another-0"]


def test_a_block_is_not_read_anew_for_every_committed_group(run, whole, tmp_path, monkeypatch):
    """Where chunks hold many experts, each reading decompresses the block."""
    solve, readings = groups.solve, []
    one = {"compute": {"experts_per_group": 1}}

    def stopping(*arguments):
        if (arguments[2].stack, arguments[3], arguments[5].start) == ("encoder", 3, 6):
            raise Stopped
        return solve(*arguments)

    with monkeypatch.context() as inner, pytest.raises(Stopped):
        inner.setattr(groups, "solve", stopping)
        run(tmp_path / "out", **one)
    open_source = compress.source.open_source

    def opened(*arguments, **options):
        found = open_source(*arguments, **options)

        def expert_groups(stack, layer, size, start=0):
            readings.append((stack, layer, size, start))
            return found.expert_groups(stack, layer, size, start)

        return dataclasses.replace(found, expert_groups=expert_groups)

    monkeypatch.setattr(compress.source, "open_source", opened)
    assert run(tmp_path / "out", **one).losses == whole[1]
    of_block = [reading for reading in readings if reading[:2] == ("encoder", 3)]
    assert [reading[0] for reading in of_block] == 2 * ["encoder"]  # what is there, what is left
    assert of_block[0] == ("encoder", 3, 1, 0)


def test_committed_groups_are_applied_in_parts_that_fit(run, whole, tmp_path, monkeypatch):
    """Committed three by three, and gone on with on a device that has room for one."""
    stopped_at(run, tmp_path / "out", "encoder", 3, monkeypatch)
    sizes, on_device = [], groups.on_device

    def counted(stack, layer, group):
        sizes.append(group.stop - group.start)
        return on_device(stack, layer, group)

    monkeypatch.setattr(groups, "on_device", counted)
    report = run(tmp_path / "out", compute={"experts_per_group": 1})
    assert set(sizes) == {1}
    assert report.losses == whole[1]
    tokens = [layer.tokens for layer in report.layers]
    assert tokens == [layer["tokens"] for layer in whole[4]]


@pytest.mark.parametrize("mapped", [False, True], ids=["memory", "mapped"])
@pytest.mark.parametrize("damage", ["bytes", "short", "gone"])
def test_damaged_activations_are_made_again(damage, mapped, run, whole, tmp_path, monkeypatch):
    compute = {"buffer_dir": str(tmp_path / "buffers")} if mapped else {}
    stopped_at(run, tmp_path / "out", "decoder", 1, monkeypatch, compute=compute)
    newest = json.loads(last_block(tmp_path / "out"))["block"]["snapshots"]
    for snapshot in newest.values():
        file = tmp_path / "out" / resume.FOLDER / snapshot["file"]
        if damage == "bytes":
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        elif damage == "short":
            os.truncate(file, 100)
        else:
            file.unlink()
    out = io.StringIO()
    report = run(tmp_path / "out", compute=compute, console=rich.console.Console(file=out))
    assert "walking the decoder again, without solving what is committed" in out.getvalue()
    assert result(tmp_path / "out", report) == whole


def last_block(output):
    lines = (output / resume.FOLDER / resume.LOG).read_text().splitlines()
    return next(line for line in reversed(lines) if line.startswith('{"block"'))


@pytest.mark.parametrize("first", [False, True], ids=["from memory", "from a map"])
def test_buffers_may_move_between_attempts(first, run, whole, tmp_path, monkeypatch):
    places = [{}, {"buffer_dir": str(tmp_path / "buffers")}]
    stopped_at(run, tmp_path / "out", "decoder", 3, monkeypatch, compute=places[first])
    compute = {**places[not first], "experts_per_group": 2}
    report = run(tmp_path / "out", compute=compute)
    assert report.losses == whole[1]
    assert report.machine["attempts"] == 2


@pytest.mark.parametrize(
    ("quantizer", "options"),
    [
        (Quantizer(bits=3, true_sequential=True), {"store_dtype": "float32"}),
        (Quantizer(bits=2, group_size=32, block_size=32), {"codec": "dense"}),
        (Quantizer(method="rtn"), {}),
        (
            Quantizer(grid="least_squares", penalty=0.05, sweeps=1),
            {"codec": "tunstall"},
        ),
        (Quantizer(), {"compute": {"activation_dtype": "bfloat16"}}),
    ],
    ids=["uniform", "dense", "rtn", "least squares", "bfloat16"],
)
def test_every_way_of_quantizing_goes_on(quantizer, options, run, tmp_path, monkeypatch):
    options = {"quantizer": quantizer, **options}
    expected = result(tmp_path / "whole", run(tmp_path / "whole", **options))
    stopped_at(run, tmp_path / "out", "encoder", 3, monkeypatch, **options)
    assert result(tmp_path / "out", run(tmp_path / "out", **options)) == expected


def test_other_settings_are_refused_and_named(run, text, tmp_path, monkeypatch, data_dir):
    stopped_at(run, tmp_path / "out", "encoder", 1, monkeypatch)
    files = (file for file in (tmp_path / "out").rglob("*") if file.is_file())
    kept = {file: file.read_bytes() for file in files if file.name != resume.LOCK}
    begun = "holds an unfinished compression of other settings"
    for options, named in [
        ({"quantizer": Quantizer(bits=3)}, "BITS was 'ternary', is 3"),
        ({"quantizer": Quantizer(damping=0.2)}, "DAMPING was 0.1, is 0.2"),
        (
            {"quantizer": Quantizer(grid="least_squares", penalty=0.1)},
            "GRID was 'minmax', is 'least_squares'.*LAMBDA was 0.0, is 0.1",
        ),
        ({"num_samples": 17}, "calibration samples .* was '16 with .*, is '17 with"),
        ({"text": dataclasses.replace(text, seed=1)}, "calibration samples"),
        ({"store_dtype": "float32"}, "STORE_DTYPE was 'bfloat16', is 'float32'"),
        ({"compute": {"batch_tokens": 64}}, "BATCH_TOKENS was 1024, is 64"),
    ]:
        with pytest.raises(CheckpointError, match=f"{begun} .*{named}"):
            run(tmp_path / "out", **options)
    other = data_dir / "t5x/tiny_switch_c/legacy"
    with pytest.raises(CheckpointError, match=f"{begun} .*CHECKPOINT_PATH was"):
        compress.compress(str(other), str(tmp_path / "out"), text, num_samples=16)
    assert {f: f.read_bytes() for f in kept} == kept


def test_two_processes_cannot_write_to_one_folder(run, tmp_path, monkeypatch):
    finish = packed.finish

    def meanwhile(output):
        with pytest.raises(CheckpointError, match=rf"is being written by process {os.getpid()} on"):
            run(tmp_path / "out")
        return finish(output)

    monkeypatch.setattr(packed, "finish", meanwhile)
    run(tmp_path / "out")


def test_a_disk_without_locks_is_warned_of(run, tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(resume.fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="cannot be locked"):
        run(tmp_path / "out", quantizer=Quantizer(method="rtn"))


def test_a_stopped_run_may_be_finished_but_for_its_report(run, whole, tmp_path, monkeypatch):
    def stopping(*arguments):
        raise Stopped

    with monkeypatch.context() as inner, pytest.raises(Stopped):
        inner.setattr(compress.report_page, "save", stopping)
        run(tmp_path / "out")
    packed.open_checkpoint(tmp_path / "out")
    assert result(tmp_path / "out", run(tmp_path / "out")) == whole


def test_dry_run_tells_that_a_run_would_go_on(run, tmp_path, monkeypatch):
    stopped_at(run, tmp_path / "out", "encoder", 1, monkeypatch)
    out = io.StringIO()
    run(tmp_path / "out", dry_run=True, console=rich.console.Console(file=out))
    assert "a run that was stopped would go on" in out.getvalue()


def test_what_a_killed_end_left_is_removed(run, tmp_path, monkeypatch):
    with monkeypatch.context() as inner:
        inner.setattr(resume.shutil, "rmtree", lambda *_, **__: None)
        run(tmp_path / "out", quantizer=Quantizer(method="rtn"))
    assert (tmp_path / "out" / resume.FOLDER).exists()
    packed.open_checkpoint(tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds a finished packed checkpoint"):
        run(tmp_path / "out")
    assert not (tmp_path / "out" / resume.FOLDER).exists()


def test_a_folder_that_only_has_the_name_is_left_alone(run, tmp_path):
    """Beside what is no checkpoint, with files that no run wrote, or in a dry run."""
    project, novel = tmp_path / "project", tmp_path / "project" / resume.FOLDER / "novel.txt"
    novel.parent.mkdir(parents=True)
    novel.write_text("It was")
    (project / packed.MANIFEST).write_text("{}")
    for dry_run in (True, False):
        with pytest.raises(CheckpointError, match="holds"):
            run(project, dry_run=dry_run)
        assert novel.read_text() == "It was"
    tiny_stores.write(tmp_path / "store", Kind("qmoe"))
    shutil.copytree(novel.parent, tmp_path / "store" / resume.FOLDER)
    left = tmp_path / "other" / resume.FOLDER / resume.LOCK
    shutil.copytree(tmp_path / "store", tmp_path / "other")
    (left.parent / "novel.txt").unlink()
    left.write_text("")
    resume.tidy(tmp_path / "store")
    assert (tmp_path / "store" / resume.FOLDER / "novel.txt").exists()
    with pytest.raises(CheckpointError, match="holds a finished packed checkpoint"):
        run(tmp_path / "other", dry_run=True)
    assert left.exists()
    resume.tidy(tmp_path / "other")
    assert not left.parent.exists()


def test_killed_while_the_journal_is_first_written(run, whole, tmp_path, monkeypatch):
    """A kill tidies nothing away, so that the unfinished file stays."""
    real = os.replace

    def replace(source, target):
        if pathlib.Path(target).name == packed.JOURNAL:
            raise Stopped
        real(source, target)

    with monkeypatch.context() as inner, pytest.raises(Stopped):
        inner.setattr(os, "replace", replace)
        run(tmp_path / "out")
    (tmp_path / "out" / f"{packed.JOURNAL}.tmp").write_text("{")
    assert result(tmp_path / "out", run(tmp_path / "out")) == whole


def test_lines_of_other_processes_that_stand_there_twice(run, whole, tmp_path, monkeypatch):
    """Two files with the same group, as two attempts at once would leave them."""
    stopped_at(run, tmp_path / "out", "encoder", 3, monkeypatch)
    folder = tmp_path / "out" / resume.FOLDER
    journal = (tmp_path / "out" / packed.JOURNAL).read_text().splitlines(keepends=True)
    records = (folder / resume.LOG).read_text().splitlines(keepends=True)
    line = max(n for n, text in enumerate(journal) if '"experts"' in text)
    record = max(n for n, text in enumerate(records) if '"group"' in text)
    both = {"line": journal.pop(line).rstrip(), "record": json.loads(records.pop(record))}
    (tmp_path / "out" / packed.JOURNAL).write_text("".join(journal))
    (folder / resume.LOG).write_text("".join(records))
    for name in ("process-1.jsonl", "process-2.jsonl"):
        (folder / name).write_text(2 * (json.dumps(both) + "\n"))
    result(tmp_path / "out", run(tmp_path / "out"))
    experts = (tmp_path / "out" / packed.JOURNAL).read_text().splitlines()
    assert len(experts) == len(set(experts))


@pytest.mark.parametrize("content", ["{\n", "[]\n", '{"line": 3}\n'])
def test_a_damaged_file_of_another_process_is_named(content, run, tmp_path, monkeypatch):
    stopped_at(run, tmp_path / "out", "encoder", 1, monkeypatch)
    (tmp_path / "out" / resume.FOLDER / "process-1.jsonl").write_text(content)
    with pytest.raises(CheckpointError, match=r"process-1\.jsonl is damaged"):
        run(tmp_path / "out")


@pytest.mark.parametrize("line", [0, 2])
def test_a_damaged_record_is_named(line, run, tmp_path, monkeypatch):
    stopped_at(run, tmp_path / "out", "encoder", 3, monkeypatch)
    file = tmp_path / "out" / resume.FOLDER / resume.LOG
    lines = file.read_text().splitlines()
    lines[line] = lines[line][:-9]
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(CheckpointError, match=r"run\.jsonl is damaged .* this compression cannot"):
        run(tmp_path / "out")


def test_another_checkpoint_of_the_same_size_is_refused(run, tmp_path, monkeypatch):
    stopped_at(run, tmp_path / "out", "encoder", 1, monkeypatch)
    outer_params = compress.source.outer_params

    def rescaled(opened):
        return {name: array * array.dtype.type(2) for name, array in outer_params(opened).items()}

    monkeypatch.setattr(compress.source, "outer_params", rescaled)
    with pytest.raises(CheckpointError, match=r"is not what .* was begun with"):
        run(tmp_path / "out")


COMMAND = """
import sys
from qmoe_jax import main
sys.exit(main.main(["qmoe-jax", "--run_mode=compress", *sys.argv[1:]]))
"""


def test_killed_at_any_moment(text, data_dir, tmp_path):
    """A process that is killed leaves no word behind, and perhaps half a line."""
    settings = {
        "CHECKPOINT_PATH": str(data_dir / "t5x/tiny_switch_base/legacy"),
        "SENTENCEPIECE_MODEL_FILE": text.sentencepiece_model_file,
        "CALIBRATION_FILES": text.files,
        "VALIDATION_FILES": text.validation_files,
        "TASK_FEATURE_LENGTHS": {"inputs": 64},
        "DOCUMENT_MODE": "split",
        "NUM_SAMPLES": 16,
        "NUM_VALIDATION_SAMPLES": 4,
        "COMPARE_ROUND_TO_NEAREST": True,
        "EXPERTS_PER_GROUP": 1,
    }
    flags = [f"--gin.{name}={value!r}" for name, value in settings.items()]

    def begin(output):
        command = [sys.executable, "-c", COMMAND, *flags, f"--gin.OUTPUT_DIR={str(output)!r}"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def outcome(output):
        files = {str(f.relative_to(output)): f.read_bytes() for f in output.rglob("*.bin")}
        return files, json.loads((output / "report.json").read_text())["losses"]

    started = time.monotonic()
    assert begin(tmp_path / "whole").wait() == 0
    longest = time.monotonic() - started
    expected = outcome(tmp_path / "whole")
    rng, kills, output = random.Random(0), 0, None
    while kills < KILLS or output is not None:
        output = output or tmp_path / str(kills)
        log = output / resume.FOLDER / resume.LOG
        before = log.read_text().count('"attempt"') if log.exists() else 0
        process = begin(output)
        while process.poll() is None and kills < KILLS:
            if log.exists() and log.read_text().count('"attempt"') > before:
                time.sleep(rng.uniform(0, longest / 2))
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        code = process.wait()
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        if (output / packed.MANIFEST).exists() and not log.exists():  # killed when it was done
            assert outcome(output) == expected, f"after {kills} kills"
            output = None
