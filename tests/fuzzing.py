# SPDX-License-Identifier: Apache-2.0
"""Damaged checkpoints of every readable kind, made from sound ones by a seed.

A target makes a small sound checkpoint and reads all of it. An example changes one or two of its
files: bytes flipped, cut, spliced, or a value deep in its JSON, msgpack, zip or checksummed arrays,
with everything around it intact, so that the change gets past the outermost check.
"""

import contextlib
import dataclasses
import faulthandler
import io
import json
import pathlib
import random
import re
import resource
import shutil
import signal
import tempfile
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import classic_t5x
import flax.serialization
import flax.traverse_util
import msgpack
import numpy as np
import tensorstore as ts
import tiny_stores
from tiny_stores import Kind

from pallas_kernels import testing
from pallas_kernels.packed import PackedExperts
from qmoe_jax.checkpoints import (
    huggingface_writer,
    orbax_pack,
    orbax_pack_writer,
    packed,
    published,
    source,
    t5x_writer,
)
from qmoe_jax.checkpoints.errors import CheckpointError
from qmoe_jax.codec import packing
from qmoe_jax.models import config as configs
from qmoe_jax.models.config import SwitchConfig

SECONDS = 20  # for one example; a sound one takes some hundredths
MEGABYTES = 256  # more than before the example
_NUMBERS = (0, -1, 1, 3, 2**31 - 1, 2**31, 2**32, 2**63 - 1, -(2**63), 10**30, 1e308)
_VALUES = (None, True, "", "..", "/etc/passwd", "x" * 300, [], {}, [[]], 0.5, *_NUMBERS)
_ORBAX = ("_METADATA", "_CHECKPOINT_METADATA")  # JSON
_DEEP = "thousands of lists, one in another"
_CONFIG = SwitchConfig(
    vocab_size=20,
    emb_dim=8,
    num_heads=2,
    head_dim=3,
    mlp_dim=16,
    expert_mlp_dim=16,
    num_encoder_layers=2,
    num_decoder_layers=2,
    encoder_sparse_layers=(1,),
    decoder_sparse_layers=(1,),
    num_experts=3,
)


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of checkpoint: how to make a sound one in a new folder, and how to read all of it."""

    make: Callable[[pathlib.Path], object]
    read: Callable[[pathlib.Path], None]


class Slow(BaseException):
    """No `Exception`, so that no reader takes it for damage."""


def _params() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = configs.param_shapes(_CONFIG)
    return {k: generator.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


def _make_classic(folder: pathlib.Path) -> None:
    inline = {k: v for k, v in _params().items() if v.ndim < 2}
    zarr = {k: v for k, v in _params().items() if v.ndim >= 2}
    specs = {name: classic_t5x.array_spec(name, values) for name, values in zarr.items()}
    classic_t5x.write_msgpack(folder, inline | specs)
    for name, values in zarr.items():
        chunks = tuple(-(-size // 2) for size in values.shape)
        place = folder / f"target.{name.replace('/', '.')}"
        classic_t5x.write_array(place, values, chunks, classic_t5x.ZSTD)


def _make_orbax(folder: pathlib.Path) -> None:
    """As Orbax of 2024 lays it out: placeholders and an index beside the zarr directories."""
    state = folder / "state"
    state.mkdir(parents=True)
    target = {name: f"PLACEHOLDER://target.{name.replace('/', '.')}" for name in _params()}
    tree = {"target": flax.traverse_util.unflatten_dict(target, sep="/")}
    (state / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(tree))
    (state / "_METADATA").write_text(json.dumps({"tree_metadata": _tree_metadata()}))
    for name, values in _params().items():
        place = state / f"target.{name.replace('/', '.')}"
        classic_t5x.write_array(place, values, values.shape, classic_t5x.ZSTD)


def _make_ocdbt(folder: pathlib.Path) -> None:
    """As Orbax of 2026 does: one store for all arrays, no msgpack."""
    state = folder / "state"
    state.mkdir(parents=True)
    (state / "_METADATA").write_text(json.dumps({"tree_metadata": _tree_metadata()}))
    for name, values in _params().items():
        ocdbt = {"driver": "ocdbt", "base": f"file://{state}/"}
        kvstore = ocdbt | {"path": f"target.{name.replace('/', '.')}/"}
        spec = {"driver": "zarr", "kvstore": kvstore, "dtype": "float32"}
        spec["metadata"] = {"shape": values.shape, "chunks": values.shape}
        ts.open(spec, create=True).result().write(values).result()


def _tree_metadata() -> dict[str, Any]:
    found = {}
    for name in _params():
        keys = ["target", *name.split("/")]
        key_metadata = [{"key": key, "key_type": 2} for key in keys]
        found[str(tuple(keys))] = {"key_metadata": key_metadata, "value_metadata": {}}
    return found


def _make_huggingface(folder: pathlib.Path) -> None:
    t5x_writer.save(folder.parent / "written", _params(), 3)
    written = source.open_source(folder.parent / "written")
    huggingface_writer.save(folder, written, "bfloat16", max_shard_bytes=4000)


def _make_published(folder: pathlib.Path) -> None:
    pack = pathlib.Path(__file__).parent / "data" / "qmoe" / "tiny_qmoe_ckpt"
    shutil.copytree(pack, folder)


def _make_orbax_pack(folder: pathlib.Path) -> None:
    store = tiny_stores.write(folder.parent / "store", Kind("qmoe"))
    orbax_pack_writer.save(folder, store)


def _read_source(folder: pathlib.Path) -> None:
    opened = source.open_source(folder)
    source.outer_params(opened)
    for stack in configs.STACKS:
        for layer in range(configs.num_layers(opened.config, stack)):
            source.layer_params(opened, stack, layer)
            if layer in configs.sparse_layers(opened.config, stack):
                for _ in opened.expert_groups(stack, layer, 2):
                    pass


def _read_packed(folder: pathlib.Path) -> None:
    """Whatever opens must decode inside its bounds, which NumPy checks."""
    store = packed.open_checkpoint(folder)
    packed.read_params(store, list(store.params))
    for stack in configs.STACKS:
        for layer in configs.sparse_layers(store.header.config, stack):
            for _, experts in packed.read_groups(store, stack, layer):
                _decode(experts)


def _decode(experts: Mapping[str, Any]) -> None:
    for record in experts.values():
        if isinstance(record, PackedExperts):
            testing.dense(record, packing.entries(record.codec))


def _read_published(folder: pathlib.Path) -> None:
    checkpoint = published.open_checkpoint(folder)
    published.read_params(checkpoint, "")
    for number in range(len(checkpoint.layers)):
        for _, experts in published.read_groups(checkpoint, number, 8):
            _decode(experts)


def _read_orbax_pack(folder: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory() as again:
        orbax_pack.import_checkpoint(orbax_pack.open_checkpoint(folder), pathlib.Path(again))
        _read_packed(pathlib.Path(again))


TARGETS = {
    "t5x": Target(_make_classic, _read_source),
    "orbax": Target(_make_orbax, _read_source),
    "ocdbt": Target(_make_ocdbt, _read_source),
    "huggingface": Target(_make_huggingface, _read_source),
    "orbax pack": Target(_make_orbax_pack, _read_orbax_pack),
    "published": Target(_make_published, _read_published),
    "ternary": Target(lambda folder: tiny_stores.write(folder, Kind("qmoe")), _read_packed),
    "tunstall": Target(lambda folder: tiny_stores.write(folder, Kind("tunstall")), _read_packed),
    "uniform": Target(lambda path: tiny_stores.write(path, Kind("uniform", 3, 32)), _read_packed),
}


def damaged(folder: pathlib.Path, seed: str) -> dict[pathlib.Path, bytes | None]:
    """New contents of one or two files below `folder`; None: the file is gone."""
    rng = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    # Every kind of file alike: chunks of arrays are many.
    kinds: dict[str, list[pathlib.Path]] = {}
    for path in files:
        kinds.setdefault(re.sub(r"[\d.]+|[0-9a-f]{8,}", "0", path.name), []).append(path)
    changed = {}
    for _ in range(rng.choice((1, 1, 1, 2))):
        path = rng.choice(kinds[rng.choice(sorted(kinds))])
        changed[path] = _change(rng, path, path.read_bytes(), files)
        changed |= _resealed(rng, folder, path, changed[path])
    return changed


def _change(
    rng: random.Random, path: pathlib.Path, content: bytes, files: list[pathlib.Path]
) -> bytes | None:
    if rng.random() < 0.03:
        return rng.choice((None, b"", rng.choice(files).read_bytes()))
    if rng.random() < 0.5:
        with contextlib.suppress(ValueError, OverflowError, KeyError):  # it cannot be written so
            if path.suffix == ".json" or path.name in (".zarray", *_ORBAX):
                return _dumps(_edited(rng, json.loads(content)))
            if path.name == "checkpoint":
                return _packb(_edited(rng, msgpack.unpackb(content, strict_map_key=False)))
            if path.suffix == ".pt":
                return _rezipped(rng, content)
            if path.suffix == ".safetensors":
                size = int.from_bytes(content[:8], "little")
                header = _dumps(_edited(rng, json.loads(content[8 : 8 + size])))
                return len(header).to_bytes(8, "little") + header + content[8 + size :]
    return _spliced(rng, content)


def _dumps(tree: Any) -> bytes:
    return json.dumps(tree).replace(f'"{_DEEP}"', "[" * 9999 + "]" * 9999).encode()


def _packb(tree: Any) -> bytes:
    return msgpack.packb(tree)  # pyright: ignore[reportReturnType]


def _edited(rng: random.Random, tree: Any) -> Any:
    """The tree with one value, key or element changed."""
    if isinstance(tree, dict) and tree and rng.random() < 0.85:
        key = rng.choice(list(tree))
        if rng.random() < 0.1:
            return {k: v for k, v in tree.items() if k != key}
        if rng.random() < 0.1:
            return tree | {f"{key}{rng.choice(('x', '/..', ''))}": rng.choice(_VALUES)}
        return tree | {key: _edited(rng, tree[key])}
    if isinstance(tree, list) and tree and rng.random() < 0.85:
        at = rng.randrange(len(tree))
        times = rng.choice((0, 1, 1, 1, 2))
        return [*tree[:at], *[_edited(rng, tree[at])] * times, *tree[at + 1 :]]
    if isinstance(tree, int) and rng.random() < 0.5:
        return tree + rng.choice((-1, 1, 7, 2**16))
    if isinstance(tree, bytes):
        return _spliced(rng, tree)
    if isinstance(tree, msgpack.ExtType):
        return msgpack.ExtType(tree.code, _spliced(rng, tree.data))
    return _DEEP if rng.random() < 0.03 else rng.choice(_VALUES)


def _spliced(rng: random.Random, content: bytes) -> bytes:
    data, size = bytearray(content), len(content)
    if not size:
        return bytes(rng.randbytes(rng.randrange(40)))
    at = rng.randrange(min(size, 200) if rng.random() < 0.5 else size)
    to = min(size, at + rng.choice((1, 2, 4, 8, 40)))
    match rng.randrange(7):
        case 0:
            data[at] = rng.randrange(256)
        case 1:
            data[at] ^= 1 << rng.randrange(8)
        case 2:
            return content[:at]
        case 3:
            data[at:to] = b""
        case 4:
            data[at:at] = rng.randbytes(to - at)
        case 5:
            data[at:to] = rng.choice((b"\0", b"\xff", b"9")) * (to - at)
        case 6:
            number = rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1)) % 2 ** (8 * (to - at))
            data[at:to] = number.to_bytes(to - at, rng.choice(("little", "big")))
    return bytes(data)


def _rezipped(rng: random.Random, content: bytes) -> bytes:
    """A file of torch with one member changed and all checksums right."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    name = pickled if rng.random() < 0.6 else rng.choice(list(members))
    members[name] = _spliced(rng, members[name])
    with zipfile.ZipFile(out := io.BytesIO(), "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def _resealed(
    rng: random.Random, folder: pathlib.Path, path: pathlib.Path, content: bytes | None
) -> dict[pathlib.Path, bytes | None]:
    """Where arrays or manifest of a packed store changed: checksums as such files would have."""
    manifest = folder / packed.MANIFEST
    if content is None or not manifest.exists() or rng.random() < 0.3:
        return {}
    try:
        tree = json.loads(content if path == manifest else manifest.read_bytes())
        for entry in tree["entries"]:
            file = entry["file"]
            if path == folder / file["name"]:
                file["nbytes"] = len(content)
                for array in file["arrays"].values():
                    size = np.dtype(_dtype(array["dtype"])).itemsize * int(np.prod(array["shape"]))
                    data = content[array["offset"] : array["offset"] + size]
                    array["crc32"] = zlib.crc32(data)
        return {manifest: tiny_stores.seal(tree)}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}  # not a manifest any more


def _dtype(name: str) -> str:
    return "uint16" if name == "bfloat16" else name


def check(target: Target, folder: pathlib.Path, seed: str) -> bool:
    """Reads a damaged copy and puts the files back; whether it was refused.

    Raises:
      AssertionError: an error that is not ours, too long, or too much memory.
    """
    changed = damaged(folder, seed)
    before = {path: path.read_bytes() for path in changed}
    try:
        for path, content in changed.items():
            path.unlink()
            if content is not None:
                path.write_bytes(content)
        with _limited():
            return _refused(target, folder)
    except Slow as slow:
        raise AssertionError(f"example {seed}: more than {SECONDS} s") from slow
    except AssertionError as error:
        files = ", ".join(str(path.relative_to(folder)) for path in changed)
        raise AssertionError(f"example {seed} ({files}): {error}") from error
    finally:
        for path, content in before.items():
            path.write_bytes(content)


def _refused(target: Target, folder: pathlib.Path) -> bool:
    try:
        target.read(folder)
    except CheckpointError as error:
        assert str(error).strip(), "an error without a word"
        assert len(str(error)) < 4000, "an error that prints the file"
        return True
    except ValueError as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        shown = "".join(traceback.format_exception(error))
        # The parameters are sound, but not those of a Switch Transformer.
        assert last.filename.endswith("models/config.py"), shown
        return True
    except Exception as error:
        raise AssertionError("".join(traceback.format_exception(error))) from error
    return False


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(*_):
        raise Slow

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True)  # for code that Python cannot stop
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        faulthandler.cancel_dump_traceback_later()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) >> 10
    assert grown < MEGABYTES, f"{grown} MB of memory"
