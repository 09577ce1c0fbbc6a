"""Running one operation at once on NumPy arrays: what every function of ``ops`` shares."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

from mla_backend import _core
from mla_backend.devices import open_cuda
from mla_backend.errors import FormatError, ShapeError, UnsupportedError, UsageError
from mla_backend.formats import Format, by_name
from mla_backend.quant_tensor import QuantTensor

Array: TypeAlias = npt.NDArray[Any]
F32: TypeAlias = npt.NDArray[np.float32]
I32: TypeAlias = npt.NDArray[np.int32]
Weight: TypeAlias = Array | QuantTensor
Precision: TypeAlias = Literal["fast", "exact"]

_BACKEND = re.compile(r"cpu|cuda(?::(\d+))?")
_FORMAT_OF_DTYPE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32"}


class Where(TypedDict, total=False):
    """The keywords that every function of ``ops`` takes, for callers that pass them on."""

    backend: str
    isa: str | None
    threads: int | None


def available_isas() -> list[str]:
    """The instruction sets that this CPU can run kernels of, best first."""
    return list(_core.available_isas())


@lru_cache(maxsize=8)
def _pool(n_threads: int) -> _core.ThreadPool:
    """Pools cost a start of threads, so scripts that call op after op share them."""
    return _core.ThreadPool(n_threads)


@lru_cache(maxsize=8)
def _cuda(number: int) -> _core.Backend:
    """Shared likewise. Nothing runs twice here, so nothing is recorded."""
    return open_cuda(number, record=False)


def _device(op: str, name: str, cpu: _core.CpuBackend) -> _core.Backend:
    found = _BACKEND.fullmatch(name)
    if found is None:
        raise UnsupportedError(f"{op}: backend {name!r}, accepted is cpu, cuda, cuda:1 and so on")
    return cpu if name == "cpu" else _cuda(int(found[1] or 0))


def _memory(array: Array) -> tuple[Array, int]:
    """The same memory with ascending strides, and where in it the array starts, in bytes."""
    ascending = array[tuple(slice(None, None, -1 if s < 0 else 1) for s in array.strides)]
    steps = zip(array.strides, array.shape, strict=True)
    return ascending, sum(-stride * max(n - 1, 0) for stride, n in steps if stride < 0)


def _tensor(op: str, name: str, value: Weight) -> _core.Tensor:
    if isinstance(value, QuantTensor):
        strides = [*value.rows.strides[:-1], by_name(value.format).block_bytes]
        memory, offset = _memory(value.rows)
        return _core.Tensor(memory, value.format, list(value.shape), strides, offset)
    array = np.asarray(value)
    format = _FORMAT_OF_DTYPE.get(array.dtype.name)
    if format is None or not array.dtype.isnative:
        raise FormatError(
            f"{op}: {name} is {array.dtype.name if array.dtype.isnative else array.dtype}, "
            "accepted is float32, float16 or bfloat16, for ids and positions int32"
        )
    if not array.flags.aligned:
        raise ShapeError(f"{op}: the elements of {name} are not aligned to their size")
    memory, offset = _memory(array.view(np.uint16) if format == "BF16" else array)
    return _core.Tensor(memory, format, list(array.shape), list(array.strides), offset)


class Call:
    """One operation: operands become constant nodes, then it runs.

    Attributes:
        isa: of the CPU's kernels.
        refusals: after ``run``, why nodes ran on the CPU instead of the backend that was named.
    """

    def __init__(
        self, op: str, backend: str = "cpu", isa: str | None = None, threads: int | None = None
    ) -> None:
        if threads is not None and threads < 1:
            raise UsageError(f"{op}: threads is {threads}, accepted is 1 or more")
        cpu = _core.CpuBackend(_pool(threads or 0), isa or "")
        self._op = op
        self._device = _device(op, backend, cpu)
        self.isa = cpu.isa
        # What the device refuses, the CPU takes.
        self._workspace = _core.Workspace(list(dict.fromkeys((self._device, cpu))))
        self.graph = _core.Graph()
        self.refusals: tuple[str, ...] = ()

    def operand(self, name: str, value: Weight) -> _core.Node:
        """The value's own memory as a node."""
        return self.graph.weight(name, _tensor(self._op, name, value))

    def optional(self, name: str, value: Array | None) -> _core.Node | None:
        """Likewise, or None."""
        return None if value is None else self.operand(name, value)

    def state(self, name: str, format: Format, shape: Sequence[int]) -> _core.Node:
        """Zeros that operations write, in the memory of the backend."""
        memory = _core.DeviceMemory(self._device, format.n_bytes(shape))
        return self.graph.state(name, memory.tensor(format.name, list(shape)))

    def run(self, *nodes: _core.Node) -> tuple[Array, ...]:
        """Compute the nodes. The workspace is this call's own, so the results stay as they are."""
        for node in nodes:
            self.graph.output(node)
        executor = _core.Executor(self.graph, self._workspace)
        executor.run({})
        self.refusals = tuple(executor.report()["refusals"])
        return tuple(executor.output(i) for i in range(len(nodes)))
