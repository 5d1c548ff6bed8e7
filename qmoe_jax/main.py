# SPDX-License-Identifier: Apache-2.0
"""The command line, in T5X's manner: a run mode, gin files, and settings that override them.

    qmoe-jax --run_mode=compress --gin.CHECKPOINT_PATH=/models/checkpoint_500100 ...

Without --gin_file the run mode's defaults are taken, t5x_configs/runs/{run_mode}.gin: they say what
must be set. docs/configuration.md lists all that can be.
"""

import logging
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import gin
import jax

from qmoe_jax import bindings, options
from qmoe_jax.checkpoints import array_files
from qmoe_jax.options import Options
from qmoe_jax.runs import (
    compress,
    devices,
    evaluate,
    export,
    import_pack,
    infer,
    inspect_checkpoint,
    plan,
    train,
)

# Run mode -> function, and its parameter for the folder that config.gin goes to, if it has one.
RUN_MODES: dict[str, tuple[Callable[..., Any], str | None]] = {
    "compress": (compress.compress, "output_dir"),
    "eval": (evaluate.evaluate, "eval_output_dir"),
    "export": (export.export, "output_dir"),
    "import": (import_pack.import_pack, "output_dir"),
    "infer": (infer.infer, "infer_output_dir"),
    "inspect": (inspect_checkpoint.inspect_checkpoint, None),
    "plan": (plan.plan, None),
    "train": (train.train, "model_dir"),
}
RESUMED = {"compress", "infer", "train"}  # go on from what is finished
INTERRUPTED = 130
OTHERS_LEAVE = 2.0  # seconds in which processes that were told of an error end
SMALLER = (
    "lower EXPERTS_PER_GROUP if it was solving experts, BATCH_SIZE if it was training, else "
    "BATCH_TOKENS"
)
ROOT = str(pathlib.Path(__file__).resolve().parents[1])  # holds t5x_configs, installed or not


def run() -> None:
    """The console script."""
    devices.keep_freed_memory()
    devices.keep_compiled_programs()
    code = main(sys.argv)
    if code == INTERRUPTED or (code and jax.process_count() > 1):
        # JAX's threads may still be at work, and crash in a regular exit; other processes are not
        # to be waited for, but the first one holds the service that they would miss.
        sys.stdout.flush()
        sys.stderr.flush()
        if jax.process_count() > 1 and jax.process_index() == 0:
            time.sleep(OTHERS_LEAVE)
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str]) -> int:
    """Runs one mode; a user's mistake ends in one line on standard error and exit code 1."""
    traceback, mode = False, ""
    try:
        given = options.parse(argv, RUN_MODES, ROOT, __doc__ or "")
        traceback, mode = given.traceback, given.run_mode
        _check_processes(given)
        if given.multiprocess:
            devices.join_processes(
                given.coordinator_address, given.process_count, given.process_index
            )
        function, folder = RUN_MODES[given.run_mode]
        arguments = configure(function, given)
        dry_run = arguments["dry_run"] = given.dry_run or arguments.get("dry_run", False)
        function(**arguments)
        if folder and arguments.get(folder) and not dry_run and jax.process_index() == 0:
            array_files.write_text(pathlib.Path(arguments[folder], "config.gin"), gin.config_str())
    except KeyboardInterrupt:
        left = "the same command goes on" if mode in RESUMED else "what was written is incomplete"
        if RUN_MODES.get(mode, ("", None))[1] is None:
            left = "nothing was written"
        print(f"qmoe-jax: interrupted; {left}", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, RuntimeError) as error:
        message = " ".join("; ".join([str(error), *getattr(error, "__notes__", [])]).split())
        if "RESOURCE_EXHAUSTED" in message:
            message = f"the device is out of memory ({message[:200]}); {SMALLER}"
        elif traceback or isinstance(error, RuntimeError):
            raise
        print(f"qmoe-jax: error: {message}", file=sys.stderr)
        return 1
    return 0


def _check_processes(given: Options) -> None:
    if given.multiprocess and given.run_mode != "compress":
        raise ValueError(
            f"--multiprocess_gpu is for compress: start {given.run_mode} once, in one process"
        )
    named = {
        "coordinator_address": given.coordinator_address,
        "process_count": given.process_count,
        "process_index": given.process_index,
    }
    if not given.multiprocess and (found := [f"--{n}" for n, v in named.items() if v is not None]):
        raise ValueError(f"{', '.join(found)}: of no effect without --multiprocess_gpu, add it")


def configure(function: Callable[..., Any], given: Options) -> dict[str, Any]:
    """Reads gin files, then settings; returns the arguments that they give `function`.

    Raises:
      ValueError: any mistake in them.
    """
    gin.clear_config()
    logging.disable(logging.ERROR)  # gin logs each folder that lacks an included file
    try:
        for folder in given.gin_folders:
            gin.add_config_file_search_path(folder)
        for file in given.gin_files:
            gin.parse_config_file(file)
        known = bindings.used_names(gin.config_str())
        if not any(name.startswith(f"{function.__name__}.") for name in known):
            default = options.default_file(given.run_mode)
            raise ValueError(f"no gin file is for {given.run_mode}; add --gin_file={default}")
        for name, value in given.settings:
            _bind(name, value, known=bindings.used_names(gin.config_str()))
        if missing := bindings.missing_names(gin.config_str()):
            raise ValueError(_not_set(missing))
        gin.finalize()
        return _checked_arguments(function)
    except Exception as error:  # gin raises all kinds
        raise ValueError(bindings.explanation(error)) from error
    finally:
        logging.disable(logging.NOTSET)


def _not_set(names: Sequence[str]) -> str:
    first = next((name for name in names if name != "MODEL"), None)
    ways = ["--gin_file=t5x_configs/models/... for the model"] if "MODEL" in names else []
    ways += [f"--gin.{first}=... and so on"] if first else []
    return f"not set: {', '.join(names)}; add {' and '.join(ways)}"


def _bind(name: str, value: str, known: set[str]) -> None:
    if "." not in name and name not in known:  # gin would take any macro
        raise ValueError(f"no gin file uses {name}; {bindings.remedy(name, known)}")
    try:
        gin.parse_config(f"{name} = {value}")
    except SyntaxError:
        raise  # shows the setting itself
    except Exception as error:
        what = bindings.explanation(error).splitlines()[0].rstrip(".")
        meant = "" if name in known else f"; {bindings.remedy(name, known)}"
        raise ValueError(f"--gin.{name}: {what}{meant}") from error


def _checked_arguments(configurable: Callable[..., Any]) -> dict[str, Any]:
    try:
        written = gin.get_bindings(configurable, resolve_references=False)
    except ValueError:
        return {}  # a record that no gin file names
    for record in bindings.records(configurable):
        _checked_arguments(record)
    arguments = gin.get_bindings(configurable)
    bindings.check_arguments(configurable, written, arguments)
    return arguments


if __name__ == "__main__":
    run()
