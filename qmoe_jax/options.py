# SPDX-License-Identifier: Apache-2.0
"""What the command line says, in T5X's spelling."""

import ast
import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags

_GIN_FLAG = re.compile(r"--?gin\.")
_GIN_SYNTAX = ("@", "%", "'", '"', "[", "(", "{")  # what begins a value that gin must read


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags of one call.

    Attributes:
      run_mode: what to do.
      gin_files: absolute paths, read in this order.
      gin_folders: where gin looks for the files that these include.
      settings: names and values in gin's spelling, applied after the files.
      dry_run: check the inputs, write nothing.
      traceback: show where an error came from.
      multiprocess: one of several processes, which find each other by what follows, or, where that
        is None, by what SLURM and its like say.
      coordinator_address: host:port of the first process.
      process_count: how many there are.
      process_index: which this is.
    """

    run_mode: str
    gin_files: tuple[str, ...]
    gin_folders: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]
    dry_run: bool
    traceback: bool
    multiprocess: bool = False
    coordinator_address: str | None = None
    process_count: int | None = None
    process_index: int | None = None


def parse(argv: Sequence[str], run_modes: Iterable[str], root: str, about: str) -> Options:
    """Reads a command line; `--help` prints `about` and the flags, and exits.

    Args:
      argv: the program's name and its arguments.
      run_modes: those there are, the default first.
      root: the folder that holds `t5x_configs`, searched last.
      about: what the program does.

    Raises:
      ValueError: a flag, value or argument that cannot be.
      FileNotFoundError: a gin file is nowhere.
    """
    values = _flags(list(run_modes))
    try:
        _, *rest = values([_GIN_FLAG.sub("--gin_bindings=", word, count=1) for word in argv])
    except flags.Error as error:
        raise ValueError(f"{error}; --help lists the flags") from error
    if values.help:
        print(f"{about}\n{values.get_help()}")
        raise SystemExit(0)
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}; expected --flag=value without spaces")
    folders = (*values.gin_search_paths, root)
    files = values.gin_file or [default_file(values.run_mode)]
    return Options(
        run_mode=values.run_mode,
        gin_files=tuple(find_file(file, folders) for file in files),
        gin_folders=folders,
        settings=tuple(split_binding(binding) for binding in values.gin_bindings),
        dry_run=values.dry_run,
        traceback=values.traceback,
        multiprocess=values.multiprocess_gpu,
        coordinator_address=values.coordinator_address,
        process_count=values.process_count,
        process_index=values.process_index,
    )


def default_file(run_mode: str) -> str:
    """The gin file with the defaults of a run mode."""
    return f"t5x_configs/runs/{run_mode}.gin"


def split_binding(binding: str) -> tuple[str, str]:
    """Name and value of `NAME=VALUE`, the value in gin's spelling.

    References, macros, numbers, `None`, lists, dicts and what is quoted stay as they are; all else
    is text, which need not be quoted.

    Raises:
      ValueError: there is no name or no value.
    """
    name, _, value = (part.strip() for part in binding.partition("="))
    if not name or not value:
        raise ValueError(f"--gin.{binding} sets nothing; expected --gin.NAME=VALUE without spaces")
    if value.startswith(_GIN_SYNTAX):
        return name, value
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError):
        value = repr(os.path.expanduser(value))  # the shell leaves the ~ of --flag=~/x alone
    return name, value


def find_file(file: str, folders: Iterable[str]) -> str:
    """The first file of this name in the working folder or `folders`, as an absolute path.

    Raises:
      FileNotFoundError: there is none.
    """
    for folder in ("", *folders):
        path = os.path.abspath(os.path.join(folder, file))
        if os.path.isfile(path):
            return path
    raise FileNotFoundError(
        f"no gin file {file} in the working folder or {', '.join(folders)}; "
        "--gin_search_paths=FOLDER adds folders"
    )


def _flags(run_modes: list[str]) -> flags.FlagValues:
    values = flags.FlagValues()
    own: dict[str, Any] = {"flag_values": values, "module_name": "flags"}
    flags.DEFINE_enum("run_mode", run_modes[0], run_modes, "What to do.", **own)
    flags.DEFINE_multi_string("gin_file", [], "A gin file; of several, later ones win.", **own)
    flags.DEFINE_multi_string("gin_bindings", [], "NAME=VALUE; also --gin.NAME=VALUE.", **own)
    flags.DEFINE_list("gin_search_paths", [], "Folders to look for gin files in.", **own)
    flags.DEFINE_bool("dry_run", False, "Check the inputs and write nothing.", **own)
    flags.DEFINE_bool("traceback", False, "Show where an error came from.", **own)
    several = "One of several processes; where they find each other is detected or given (T5X)."
    flags.DEFINE_bool("multiprocess_gpu", False, several, **own)
    flags.DEFINE_string("coordinator_address", None, "host:port of the first process.", **own)
    flags.DEFINE_integer("process_count", None, "Number of processes.", **own)
    flags.DEFINE_integer("process_index", None, "Which of them this is.", **own)
    flags.DEFINE_bool("help", False, "Show this.", **own)
    return values
