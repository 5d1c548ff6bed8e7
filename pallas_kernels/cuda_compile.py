# SPDX-License-Identifier: Apache-2.0
"""Compiles kernels for NVIDIA GPUs on machines that have none: registers, spills, instructions.

JAX lowers for CUDA anywhere. What it would hand to the driver's compiler is a Triton module inside
the program; the `triton` package turns that into machine code with its own assembler.
"""

import contextlib
import dataclasses
import pathlib
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import triton
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.triton import dialect
from triton.backends.compiler import GPUTarget

from pallas_kernels.device.triton_launch import FP_FUSION, Launch

_TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_DEVICE_KINDS = {80: "NVIDIA A100-SXM4-80GB", 90: "NVIDIA H100 80GB HBM3"}
_CUSTOM_CALL = "__gpu$xla.gpu.triton"
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_BRANCH = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)")
_TYPES = {
    "int32": "i32",
    "uint16": "u16",
    "uint8": "u8",
    "uint32": "u32",
    "bfloat16": "bf16",
    "float32": "fp32",
}
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """Machine code of one kernel, and what a block of it takes."""

    name: str
    capability: int  # 80, 90, ...
    warps: int
    registers: int  # a thread
    shared_bytes: int  # a block, static
    spilled_bytes: int  # a thread: stack and local memory
    instructions: tuple[str, ...]  # of one thread, in program order
    loops: tuple[tuple[int, int], ...]  # first and last instruction; the longest comes last

    def executed(self, trips: float) -> float:
        """Instructions a warp executes that runs through the longest loop `trips` times."""
        total = sum(not text.startswith("NOP") for text in self.instructions)
        if not self.loops:
            return total
        first, last = self.loops[-1]
        return total + (trips - 1) * (last - first + 1)


def compile_kernels(
    function: Callable[..., Any], *arguments: Any, capability: int = 90
) -> list[CompiledKernel]:
    """Compiles the Pallas-Triton kernels of a JAX function, in program order.

    Args:
      function: of arrays.
      arguments: arrays or `jax.ShapeDtypeStruct`s, or pytrees of them.
      capability: 80 for A100, 90 for H100 and H200.

    Raises:
      RuntimeError: the function has no such kernel, or one does not compile.
    """
    with _aimed_at(capability):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    found = []
    module: Any = lowered.compiler_ir()
    for attributes in _custom_calls(module.operation):
        number = {k: ir.IntegerAttr(attributes[k]).value for k in ("num_warps", "num_stages")}
        name = ir.StringAttr(attributes["name"]).value
        text = _text(ir.StringAttr(attributes["ir"]).value_bytes)
        found.append(_compile_text(name, text, capability, number))
    if not found:
        raise RuntimeError("the program has no Triton kernel")
    return found


def _aimed_at(capability: int) -> contextlib.AbstractContextManager[Any]:
    """From JAX 0.11 on, Pallas lowers for the GPU that is there, or for one that is named."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    sharding: Any = jax.sharding
    device = sharding.AbstractDevice(_DEVICE_KINDS[capability], num_cores=None, platform="gpu")
    axes = (sharding.AxisType.Explicit,)
    return sharding.use_abstract_mesh(
        sharding.AbstractMesh((1,), ("device",), axes, abstract_device=device)
    )


def _custom_calls(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for inner in block:
                inner = inner.operation
                if inner.name == "stablehlo.custom_call":
                    target = ir.StringAttr(inner.attributes["call_target_name"]).value
                    if target == _CUSTOM_CALL:
                        yield ir.DictAttr(inner.attributes["mhlo.backend_config"])
                yield from _custom_calls(inner)


def _text(module: bytes) -> str:
    with mlir.make_ir_context() as context, ir.Location.unknown():
        dialect.register_dialect(context)
        context.load_all_available_dialects()
        return str(ir.Module.parse(module).operation.get_asm())


def compile_launch(launch: Launch, *, capability: int = 90) -> CompiledKernel:
    """Compiles a kernel in Triton proper, as jax-triton does: all pointers are aligned.

    Args:
      launch: its arguments may be `jax.ShapeDtypeStruct`s.
      capability: 80 for A100, 90 for H100 and H200.
    """
    operands = [*launch.arguments, launch.output]
    names = launch.kernel.arg_names
    types = {n: f"*{_TYPES[a.dtype.name]}" for n, a in zip(names, operands, strict=False)}
    source = triton.compiler.ASTSource(
        launch.kernel,
        types | dict.fromkeys(launch.constants, "constexpr"),
        constexprs=dict(launch.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(operands))},
    )
    options = {
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        "enable_fp_fusion": FP_FUSION,
    }
    return _compile(launch.kernel.__name__, source, capability, options)


def _compile_text(
    name: str, text: str, capability: int, options: Mapping[str, int]
) -> CompiledKernel:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, f"{name}.ttir")
        path.write_text(text)
        return _compile(name, str(path), capability, options)


def _compile(name: str, source: Any, capability: int, options: Mapping[str, int]) -> CompiledKernel:
    target = GPUTarget("cuda", capability, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton announces a change of its defaults
        compiled = triton.compile(source, target=target, options=dict(options))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        resources = _RESOURCES.search(_cuobjdump("-res-usage", path))
        instructions, loops = _disassembled(_cuobjdump("-sass", path))
    if resources is None or not instructions:
        raise RuntimeError(f"cuobjdump says nothing of {name}")
    registers, stack, shared, local = map(int, resources.groups())
    return CompiledKernel(
        name=name,
        capability=capability,
        warps=options["num_warps"],
        registers=registers,
        shared_bytes=max(shared, compiled.metadata.shared),
        spilled_bytes=stack + local,
        instructions=tuple(instructions),
        loops=tuple(loops),
    )


def _cuobjdump(option: str, path: pathlib.Path) -> str:
    done = subprocess.run(
        [_TOOLS / "cuobjdump", option, path], capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


def _disassembled(listing: str) -> tuple[list[str], list[tuple[int, int]]]:
    found = [match.groups() for line in listing.splitlines() if (match := _INSTRUCTION.match(line))]
    index = {int(address, 16): i for i, (address, _) in enumerate(found)}
    loops = []
    for i, (address, text) in enumerate(found):
        match = _BRANCH.search(text)
        if match and int(match[1], 16) < int(address, 16):
            loops.append((index[int(match[1], 16)], i))
    return [text for _, text in found], sorted(loops, key=lambda loop: loop[1] - loop[0])
