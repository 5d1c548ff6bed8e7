# SPDX-License-Identifier: Apache-2.0
"""Runs Triton kernels in Triton's interpreter, which `TRITON_INTERPRET=1` turns on."""

from typing import Any

import numpy as np

from pallas_kernels.device.triton_launch import Launch


class Tensor:
    """What Triton's interpreter takes for a tensor of PyTorch's, over a NumPy array."""

    def __init__(self, array: np.ndarray):
        self.array = np.ascontiguousarray(array)
        self.dtype = f"torch.{self.array.dtype.name}"
        self.shape = self.array.shape

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    # The interpreter copies storages to the host and back; here they are there.
    def untyped_storage(self) -> "Tensor":
        return self

    def cpu(self) -> "Tensor":
        return self

    def new_empty(self, *_: Any, **__: Any) -> "Tensor":
        return Tensor(np.empty(0, self.array.dtype))

    def set_(self, storage: "Tensor", *_: Any) -> None:
        self.array, self.shape = storage.array, storage.shape

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def element_size(self) -> int:
        return self.array.itemsize

    def copy_(self, other: "Tensor") -> None:
        assert other.array is self.array


def run(launch: Launch) -> np.ndarray:
    """What the kernel writes; what it does not write is 77."""
    output = Tensor(np.full(launch.output.shape, 77, launch.output.dtype))
    # Copies: it takes arrays at one address for one.
    arguments = [Tensor(np.array(argument)) for argument in launch.arguments]
    launch.kernel[launch.grid](*arguments, output, **launch.constants)
    return output.array
