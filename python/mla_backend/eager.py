"""Running one operation at once on NumPy arrays: what every function of ``ops`` shares."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

from mla_backend import _core
from mla_backend.errors import FormatError, ShapeError, UnsupportedError, UsageError
from mla_backend.formats import by_name
from mla_backend.quant_tensor import QuantTensor

Array: TypeAlias = npt.NDArray[Any]
F32: TypeAlias = npt.NDArray[np.float32]
I32: TypeAlias = npt.NDArray[np.int32]
Weight: TypeAlias = Array | QuantTensor
Precision: TypeAlias = Literal["fast", "exact"]

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


def _cpu(isa: str, n_threads: int) -> _core.CpuBackend:
    return _core.CpuBackend(_pool(n_threads), isa)


_BACKENDS: dict[str, Callable[[str, int], _core.CpuBackend]] = {"cpu": _cpu}


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
    """One operation: operands become constant nodes, then it runs."""

    def __init__(
        self, op: str, backend: str = "cpu", isa: str | None = None, threads: int | None = None
    ) -> None:
        make = _BACKENDS.get(backend)
        if make is None:
            raise UnsupportedError(f"{op}: backend {backend!r}, accepted is {', '.join(_BACKENDS)}")
        if threads is not None and threads < 1:
            raise UsageError(f"{op}: threads is {threads}, accepted is 1 or more")
        self._op = op
        device = make(isa or "", threads or 0)
        self.isa = device.isa
        self._workspace = _core.Workspace([device])
        self.graph = _core.Graph()

    def operand(self, name: str, value: Weight) -> _core.Node:
        """The value's own memory as a node."""
        return self.graph.weight(name, _tensor(self._op, name, value))

    def optional(self, name: str, value: Array | None) -> _core.Node | None:
        """Likewise, or None."""
        return None if value is None else self.operand(name, value)

    def run(self, *nodes: _core.Node) -> tuple[Array, ...]:
        """Compute the nodes. The workspace is this call's own, so the results stay as they are."""
        for node in nodes:
            self.graph.output(node)
        executor = _core.Executor(self.graph, self._workspace)
        executor.run({})
        return tuple(executor.output(i) for i in range(len(nodes)))
