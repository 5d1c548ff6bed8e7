# SPDX-License-Identifier: Apache-2.0
"""Command lines as users write them."""

import pytest

from qmoe_jax import options

MODES = ("compress", "eval")


def parse(*arguments: str, root: str) -> options.Options:
    return options.parse(["qmoe-jax", *arguments], MODES, root, "About.")


@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "t5x_configs" / "runs").mkdir(parents=True)
    for mode in MODES:
        (tmp_path / "t5x_configs" / "runs" / f"{mode}.gin").touch()
    return str(tmp_path)


@pytest.mark.parametrize(
    ("written", "gin"),
    [
        ("/tmp/x", "'/tmp/x'"),
        ("gs://bucket/checkpoint_1", "'gs://bucket/checkpoint_1'"),
        ("it's", '"it\'s"'),
        ('"/tmp/x"', '"/tmp/x"'),
        ("'/tmp/x'", "'/tmp/x'"),
        ("['a','b']", "['a','b']"),
        ("{'inputs': 512}", "{'inputs': 512}"),
        ("ternary", "'ternary'"),
        ("2", "2"),
        ("-1.5e-3", "-1.5e-3"),
        ("2024-01-01", "'2024-01-01'"),
        ("None", "None"),
        ("True", "True"),
        ("true", "'true'"),
        ("@x.Y()", "@x.Y()"),
        ("%BITS", "%BITS"),
        ("a=b", "'a=b'"),
    ],
)
def test_values_reach_gin_quoted_where_they_are_text(written, gin, root):
    given = parse(f"--gin.NAME={written}", f"--gin_bindings=NAME = {written}", root=root)
    assert given.settings == (("NAME", gin), ("NAME", gin))


def test_home_folder_is_expanded(monkeypatch, root):
    monkeypatch.setenv("HOME", "/home/someone")
    assert options.split_binding("X=~/out") == ("X", "'/home/someone/out'")


def test_defaults(root):
    given = parse(root=root)
    assert given.run_mode == "compress"
    assert given.gin_files == (f"{root}/t5x_configs/runs/compress.gin",)
    assert not given.settings and not given.dry_run and not given.traceback


def test_files_come_from_the_working_folder_then_search_paths_then_root(
    tmp_path, monkeypatch, root
):
    work, first, second = (tmp_path / name for name in ("work", "first", "second"))
    for folder, files in ((work, "a"), (first, "ab"), (second, "abc")):
        folder.mkdir()
        for file in files:
            (folder / f"{file}.gin").touch()
    monkeypatch.chdir(work)
    named = [f"--gin_file={name}" for name in ("a.gin", "b.gin", "c.gin")]
    given = parse(
        *named,
        "--gin_file=t5x_configs/runs/eval.gin",
        f"--gin_search_paths={first},{second}",
        "--dry_run",
        root=root,
    )
    assert given.gin_files == (
        str(work / "a.gin"),
        str(first / "b.gin"),
        str(second / "c.gin"),
        f"{root}/t5x_configs/runs/eval.gin",
    )
    assert given.gin_folders == (str(first), str(second), root)
    assert given.dry_run


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--gin.X", "--gin.X sets nothing; expected --gin.NAME=VALUE"),
        ("--gin.X=", "--gin.X= sets nothing"),
        ("--gin.=3", "sets nothing"),
        ("/tmp/x", "unexpected argument '/tmp/x'"),
        ("--dry-run", "Unknown command line flag 'dry-run'. Did you mean: dry_run"),
        ("--run_mode=evaluate", "should be one of <compress|eval>"),
        ("--gin_file=no.gin", "no gin file no.gin in the working folder or "),
    ],
)
def test_mistakes_are_named(argument, message, root):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        parse(argument, root=root)
    assert message in str(caught.value)


def test_help_lists_the_flags(capsys, root):
    with pytest.raises(SystemExit) as caught:
        parse("--help", root=root)
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("About.")
    assert all(flag in shown for flag in ("--run_mode: <compress|eval>", "--gin_file", "dry_run"))
