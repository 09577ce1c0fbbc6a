"""The devices of this machine as backends: the CPU always, CUDA devices where they can be used.

The CUDA module is loaded when it is first asked for, so that a machine without a GPU, or an install
without the module, loses nothing.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mla_backend import _core
from mla_backend.errors import DeviceError, UsageError

_NVIDIA = Path("/proc/driver/nvidia/version")
_ACCEPTED = "auto, cpu, cuda, or cuda:0 and the like"


@dataclass(frozen=True)
class Devices:
    """Backends that a model may use.

    Attributes:
        cpu: takes what no other device can.
        cuda: in the order of their numbers; may be empty.
    """

    cpu: _core.CpuBackend
    cuda: tuple[_core.Backend, ...] = ()

    @property
    def backends(self) -> list[_core.Backend]:
        """All of them, in order of preference."""
        return [*self.cuda, self.cpu]

    def by_name(self, name: str) -> _core.Backend:
        """The backend of this name. Raises UsageError."""
        for backend in self.backends:
            if backend.name == name:
                return backend
        known = ", ".join(backend.name for backend in self.backends)
        raise UsageError(f"device {name!r}; here are {known}")


def cuda_module() -> ModuleType | None:
    """The module of CUDA devices; None where this install has none."""
    try:
        return importlib.import_module("mla_backend._cuda")
    except ModuleNotFoundError:
        return None


def cuda_problem() -> str:
    """Why no CUDA device can be used; "" where one can."""
    module = cuda_module()
    if module is None:
        return "this install was built without CUDA"
    return str(module.device_problem())


def open_devices(cpu: _core.CpuBackend, device: str) -> tuple[Devices, str | None]:
    """The devices that ``device`` names, and a note where a GPU lies idle.

    Args:
        device: "cpu"; "cuda" (all of them) or "cuda:1", which must be usable; "auto": CUDA devices
            where there are any.

    Raises:
        UsageError: no such device. DeviceError: it cannot be used.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UsageError(f"device {device!r}; accepted are {_ACCEPTED}")
    if device == "cpu":
        return Devices(cpu), None
    problem = cuda_problem()
    if problem and device != "auto":
        raise DeviceError(f"device {device!r}: {problem}")
    if problem:
        idle = _NVIDIA.exists()
        return Devices(cpu), f"the GPU is not used: {problem}" if idle else None
    _, _, number = device.partition(":")
    numbers = [int(number)] if number else range(_module().device_count())
    return Devices(cpu, tuple(open_cuda(i) for i in numbers)), None


def open_cuda(number: int, *, record: bool = True) -> _core.Backend:
    """One CUDA device. Raises DeviceError where it cannot be used.

    ``record``: what runs again is replayed as one recorded graph.
    """
    backend: _core.Backend = _module().CudaBackend(number, record)
    return backend


def _module() -> Any:
    """The module of CUDA devices, where it has any."""
    module = cuda_module()
    if module is None or cuda_problem():
        raise DeviceError(cuda_problem())
    return module
