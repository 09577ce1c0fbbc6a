"""Importance files: what the weights of a model met while it read some text, for quantizers.

GGUF in the format of llama.cpp: ``general.type`` is ``imatrix``, and each weight has two F32
tensors, NAME.in_sum2 [G, K] and NAME.counts [G, 1]: squares summed over the rows of input, and how
many rows there were. Weights by expert have a group G for each; others have one, in which the
matrices of a weight by head follow each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from mla_backend.errors import FormatError
from mla_backend.gguf import GGUFFile, TensorInfo, Value, read_gguf
from mla_backend.gguf.writer import NewTensor, write_gguf

F32 = npt.NDArray[np.float32]

_SUMS: Final = ".in_sum2"
_COUNTS: Final = ".counts"
_DATASETS: Final = "imatrix.datasets"
_CHUNK_COUNT: Final = "imatrix.chunk_count"
_CHUNK_SIZE: Final = "imatrix.chunk_size"


@dataclass(frozen=True)
class InputSums:
    """What met one weight.

    Attributes:
        sums: float32 [G, K], squares of the inputs by column.
        counts: float32 [G], rows of input.
    """

    sums: F32
    counts: F32

    def unseen(self) -> tuple[int, ...]:
        """Groups that met nothing: experts that no token was sent to."""
        return tuple(map(int, np.flatnonzero(self.counts <= 0)))


@dataclass(frozen=True)
class Importance:
    """What met the weights of a model while it read some text.

    Attributes:
        weights: by the weight's name.
        datasets: names of the texts.
        n_chunks, chunk_size: how many pieces of text, of how many tokens each; 0 where unknown.
    """

    weights: Mapping[str, InputSums]
    datasets: tuple[str, ...]
    n_chunks: int
    chunk_size: int


def write_importance(path: str | Path, importance: Importance) -> None:
    """Write a file; it replaces ``path`` when complete. Raises OSError where it cannot."""
    arrays: dict[str, F32] = {}
    for name, met in sorted(importance.weights.items()):
        arrays[name + _SUMS] = met.sums
        arrays[name + _COUNTS] = met.counts[:, None]
    metadata: dict[str, Value | np.generic] = {
        "general.type": "imatrix",
        _DATASETS: importance.datasets,
        _CHUNK_COUNT: importance.n_chunks,
        _CHUNK_SIZE: importance.chunk_size,
    }

    def chunks(tensor: NewTensor) -> Iterator[npt.NDArray[np.uint8]]:
        yield np.ascontiguousarray(arrays[tensor.name], "<f4").reshape(-1).view(np.uint8)

    write_gguf(path, metadata, [NewTensor(n, "F32", a.shape) for n, a in arrays.items()], chunks)


def read_importance(path: str | Path) -> Importance:
    """Read a file, ours or llama.cpp's.

    Raises FormatError where it is no such file or contradicts itself, ModelError where it is
    damaged or cannot be opened, OSError where it cannot be read.
    """
    file = read_gguf(path)
    found = file.metadata.get("general.type")
    if found != "imatrix":
        raise FormatError(f"{path}: general.type is {found!r}; accepted: 'imatrix'")
    names = sorted({_weight_of(name) for name in file.tensors} - {""})
    if not names:
        raise FormatError(f"{path}: holds no importance; accepted: tensors NAME{_SUMS}")
    datasets = file.metadata.get(_DATASETS)
    return Importance(
        weights={name: _input_sums(file, name) for name in names},
        datasets=datasets if isinstance(datasets, tuple) else (),
        n_chunks=_number(file, _CHUNK_COUNT),
        chunk_size=_number(file, _CHUNK_SIZE),
    )


def _weight_of(tensor: str) -> str:
    """The weight that a tensor tells of, or nothing."""
    for suffix in (_SUMS, _COUNTS):
        if tensor.endswith(suffix):
            return tensor.removesuffix(suffix)
    return ""


def _input_sums(file: GGUFFile, name: str) -> InputSums:
    where = f"{file.paths[0]}: importance of {name!r}"
    sums, counts = (file.tensors.get(name + suffix) for suffix in (_SUMS, _COUNTS))
    if sums is None or counts is None:
        raise FormatError(f"{where}: {_SUMS if sums is None else _COUNTS} is missing")
    if not sums.format == counts.format == "F32":
        raise FormatError(f"{where}: found {sums.format} and {counts.format}; accepted: F32")
    n_groups = prod(sums.shape[:-1])
    if prod(counts.shape) != n_groups:
        raise FormatError(
            f"{where}: found {list(counts.shape)} counts for sums {list(sums.shape)}; accepted: "
            "one for each row of sums"
        )
    met = InputSums(_read(file, sums).reshape(n_groups, -1), _read(file, counts).reshape(-1))
    for values in (met.sums, met.counts):
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise FormatError(
                f"{where} is negative or not finite somewhere; accepted: sums of squares"
            )
    return met


def _read(file: GGUFFile, info: TensorInfo) -> F32:
    with file.paths[info.shard].open("rb") as stream:
        stream.seek(info.offset)
        data = stream.read(info.n_bytes)
    if len(data) < info.n_bytes:
        raise FormatError(f"{file.paths[info.shard]}: the file shrank while it was read")
    return np.frombuffer(data, "<f4").astype(np.float32).reshape(info.shape)


def _number(file: GGUFFile, key: str) -> int:
    value = file.metadata.get(key, 0)
    if not isinstance(value, int) or value < 0:
        raise FormatError(f"{file.paths[0]}: {key} is {value!r}; accepted: a number from 0 on")
    return value
