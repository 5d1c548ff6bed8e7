# SPDX-License-Identifier: Apache-2.0
"""Directories as TensorStore key-value stores: local paths and URLs take one road."""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import tensorstore as ts

from qmoe_jax.checkpoints import remote
from qmoe_jax.checkpoints.errors import CheckpointError, NoCheckpointError

# What TensorStore raises when a store cannot be reached or a stored array cannot be decoded.
FAILURES = (ValueError, RuntimeError, OSError, LookupError, MemoryError)
_SYSTEM_ERROR = re.compile(r"os_error_code='(\d+)'")
RETRY_SECONDS = (0.2, 1.0, 5.0)  # before each new try of a read that the system failed
_SHOWN = 300  # characters of the beginning, and of the end, of a long reason


def location(path: str | os.PathLike[str]) -> str:
    """The absolute path, or the URL (`gs://`, `s3://`, `https://`, ...), without a final slash."""
    text = os.fspath(path)
    return text.rstrip("/") if remote.is_url(text) else os.path.abspath(text)


def open_store(directory: str) -> ts.KvStore:
    """Opens the directory named by `location`; it need not exist yet. See `remote.store_spec`.

    Raises:
      CheckpointError: the URL is of a kind that TensorStore does not know.
    """
    folder = directory.rstrip("/") + "/"
    try:
        url = remote.is_url(folder)
        spec = remote.store_spec(folder) if url else {"driver": "file", "path": folder}
        return ts.KvStore.open(spec).result()
    except FAILURES as error:
        raise CheckpointError(
            f"cannot open `{directory}`: {reason(error)}. Give a local path or a gs://, s3://, "
            "file:// or https:// URL."
        ) from error


def read_files(store: ts.KvStore, keys: list[str]) -> list[bytes | None]:
    """The contents of several files, read concurrently; None stands for a file that is not there.

    Where a bucket may be read but not listed, services deny what is not there. So what is denied
    counts as missing, unless nothing at all can be read.

    Raises:
      CheckpointError: a file is there or may be, but cannot be read.
    """
    pending = [store.read(key) for key in keys]
    contents, denied = [], None
    for key, future in zip(keys, pending, strict=True):
        try:
            result = future.result()
        except FAILURES as error:
            if not (remote.is_url(_url(store)) and remote.is_denied(error)):
                raise _unreadable(store, key, error) from error
            denied = denied or (key, error)
            contents.append(None)
            continue
        contents.append(result.value if result.state == "value" else None)
    if denied and not any(content is not None for content in contents):
        raise _unreadable(store, *denied) from denied[1]
    return contents


def _unreadable(store: ts.KvStore, key: str, error: Exception) -> CheckpointError:
    url = _url(store)
    advice = remote.remedy(url, error) or "Check that the path is right and may be read from here."
    return CheckpointError(f"cannot read `{key}` in {url}: {reason(error)}. {advice}")


def _url(store: ts.KvStore) -> str:
    spec = store.spec().to_json()
    if spec["driver"] == "file":
        return spec["path"]
    if spec["driver"] == "s3":  # of a private service, `store.url` fails
        return f"s3://{spec['bucket']}/{spec['path']}"
    return store.url


def list_files(store: ts.KvStore, prefix: str) -> list[str]:
    """Relative names of all files, at any depth, whose name starts with `prefix` (not empty).

    Raises:
      CheckpointError: the store cannot be listed (NoCheckpointError: its kind never can, such as
        plain HTTP servers).
    """
    end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
    try:
        keys = store.list(ts.KvStore.KeyRange(prefix, end)).result()
    except NotImplementedError as error:
        raise NoCheckpointError(
            f"cannot list {_url(store)}: {reason(error)}. Give the directory of one step instead."
        ) from error
    except FAILURES as error:
        url = _url(store)
        advice = f"{remote.remedy(url, error) or ''} Give the directory of one step instead."
        raise CheckpointError(f"cannot list {url}: {reason(error)}. {advice.lstrip()}") from error
    return [key.decode("utf-8", errors="replace") for key in keys]


def open_zarr(store: ts.KvStore, directory: str) -> ts.Future[ts.TensorStore]:
    """Begins to open the zarr v2 array below `directory` (with its final slash) for reading."""
    # A missing chunk must fail: zarr's rule would read it as zeros.
    spec = {"driver": "zarr", "fill_missing_data_reads": False}
    return ts.open(spec, kvstore=store / directory, open=True, read=True)


def finished(reading: Any, again: Callable[[], Any]) -> None:
    """Waits for a read, a future; where the system fails it, as network disks do, it begins anew.

    Raises:
      Exception: one of `FAILURES`: the last try's, or of damage, which no retry mends.
    """
    for wait in RETRY_SECONDS:
        try:
            reading.result()
            return
        except FAILURES as error:
            if not _SYSTEM_ERROR.search(str(error)):
                raise
        time.sleep(wait)
        reading = again()
    reading.result()


def reason(error: Exception) -> str:
    """What went wrong, in a line: TensorStore and Orbax tell it by the page."""
    text = " ".join(str(error).split())
    if code := _SYSTEM_ERROR.search(text):  # TensorStore says it somewhere in the page
        return os.strerror(int(code[1]))
    shown = text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]} ... {text[-_SHOWN:]}"
    return shown.rstrip(".")


@contextlib.contextmanager
def explained(path: str, name: str) -> Iterator[None]:
    """Turns what TensorStore raises inside into a `CheckpointError` about array `name`."""
    try:
        yield
    except CheckpointError:
        raise
    except FAILURES as error:
        advice = remote.remedy(path, error) or (
            "The copy is incomplete or damaged: copy that array's directory again (with its "
            "dotfile `.zarray`), or the whole folder where a `manifest.ocdbt` lies (over HTTP the "
            "latter needs a server that honours ranges)."
        )
        raise CheckpointError(
            f"cannot read `{name}` of {path}: {reason(error)}. {advice}"
        ) from error
