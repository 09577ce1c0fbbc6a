"""The devices of this machine as backends: the CPU always, CUDA devices where they can be used.

The CUDA module is loaded when it is first asked for, so that a machine without a GPU, or an install
without the module, loses nothing.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from mla_backend import _core
from mla_backend.errors import DeviceError, UsageError

#: Tensor cores that multiply F16, with the loads that feed them.
OLDEST_CAPABILITY: Final = (7, 5)
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


def check_name(device: str) -> None:
    """Raise UsageError where ``device`` is none of the words that ``open_devices`` takes."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UsageError(f"device {device!r}; accepted are {_ACCEPTED}")


def open_devices(cpu: _core.CpuBackend, device: str) -> tuple[Devices, str | None]:
    """The devices that ``device`` names, and a note where a GPU lies idle.

    Args:
        device: "cpu"; "cuda" (all of them) or "cuda:1", which must be usable; "auto": CUDA devices
            where there are any.

    Raises:
        UsageError: no such device. DeviceError: it cannot be used.
    """
    cuda, note = open_gpus(device)
    return Devices(cpu, cuda), note


def open_gpus(device: str) -> tuple[tuple[_core.Backend, ...], str | None]:
    """The devices of ``open_devices`` without the CPU."""
    check_name(device)
    if device == "cpu":
        return (), None
    if device == "auto":
        return _usable_gpus()
    if problem := cuda_problem():
        raise DeviceError(f"device {device!r}: {problem}")
    _, _, number = device.partition(":")
    numbers = [int(number)] if number else range(_module().device_count())
    return tuple(open_cuda(i) for i in numbers), None


def open_cuda(number: int, *, record: bool = True) -> _core.Backend:
    """One CUDA device. Raises DeviceError where it cannot be used.

    ``record``: what runs again is replayed as one recorded graph.
    """
    module = _module()
    if 0 <= number < module.device_count() and (problem := device_problem(number)):
        raise DeviceError(f"cuda:{number}: {problem}")
    backend: _core.Backend = module.CudaBackend(number, record)
    return backend


def device_problem(number: int) -> str:
    """Why the kernels here cannot run on this device, which the driver shows; "" where they can."""
    module = _module()
    try:
        info = module.device_info(number)
    except DeviceError as error:  # all are lost to this process
        return str(error)
    return code_problem(info["name"], info["capability"], module.compiled_archs())


def code_problem(name: str, capability: tuple[int, int], archs: Sequence[str]) -> str:
    """Why kernels compiled for ``archs`` cannot run on a GPU; "" where they can.

    ``archs``: "80-real" runs on 8.0 to 8.9, "90a-real" on 9.0 alone, "80-virtual" from 8.0 on.
    """
    major, minor = capability
    is_a = f"{name} has compute capability {major}.{minor}"
    if capability < OLDEST_CAPABILITY:
        oldest = ".".join(map(str, OLDEST_CAPABILITY))
        return f"{is_a}, accepted is {oldest} or later"
    if any(_runs_on(arch, capability) for arch in archs):
        return ""
    return (
        f"{is_a}, and this build has code for {', '.join(archs)}: "
        f"install it again with MLA_CUDA_ARCHS={major}{minor}{'a' if major == 9 else ''}-real"
    )


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    found = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", arch)
    if found is None:
        return False
    compiled = int(found[1]), int(found[2])
    if found[3]:
        return compiled == capability
    ahead = found[4] != "-real" and compiled <= capability
    return ahead or (compiled[0] == capability[0] and compiled[1] <= capability[1])


def _usable_gpus() -> tuple[tuple[_core.Backend, ...], str | None]:
    """Those that can be used, and why the others cannot."""
    if problem := cuda_problem():
        idle = _NVIDIA.exists()
        return (), f"the GPU is not used: {problem}" if idle else None
    problems = {i: device_problem(i) for i in range(_module().device_count())}
    usable = tuple(open_cuda(i) for i, problem in problems.items() if not problem)
    notes = [f"cuda:{i} is not used: {problem}" for i, problem in problems.items() if problem]
    return usable, "; ".join(notes) or None


def _module() -> Any:
    """The module of CUDA devices, where it has any."""
    module = cuda_module()
    if module is None or cuda_problem():
        raise DeviceError(cuda_problem())
    return module
