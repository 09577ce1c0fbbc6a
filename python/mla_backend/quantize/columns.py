"""How much the squared error of each column counts, out of a file of importance.

Files of today are GGUF (``imatrix_file``). Those before are a list: i32 number of entries; per
entry i32 length and name of a weight, i32 calls, i32 length and float32 mean squares times the
calls; then perhaps i32 number of chunks, i32 length and name of the text.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final, NoReturn

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from ..gguf.types import MAGIC
from ..imatrix_file import Importance, InputSums, read_importance

Floats = npt.NDArray[np.float32]

#: More than any model's; a larger length is damage.
_NAME_LIMIT_BYTES: Final = 1 << 16


@dataclass(frozen=True)
class Guide:
    """Importance, and where it was read."""

    path: Path
    importance: Importance

    def of(self, name: str, shape: tuple[int, ...]) -> InputSums | None:
        """What met the weight ``name`` of ``shape`` [.., rows, K].

        Raises ModelError where it has another number of columns.
        """
        found = self.importance.weights.get(name)
        n_matrices = prod(shape[:-2])
        if found is not None and found.sums.size != n_matrices * shape[-1]:
            raise ModelError(
                f"{self.path}: importance of {name!r} has {found.sums.size} numbers; accepted: "
                f"{n_matrices} x {shape[-1]}, as in the model"
            )
        return found


def open_guide(path: str | Path) -> Guide:
    """Read a file of either kind.

    Raises:
        ModelError: it is of no known kind, damaged, or cannot be read.
        FormatError: it is a GGUF file of something else, or contradicts itself.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
        return Guide(path, read_importance(path) if is_gguf else _read_list(path))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error


def columns(met: InputSums, matrix: int, n_columns: int) -> Floats | None:
    """Importance of the columns of one matrix, float32 [K]; None where nothing met it."""
    by_matrix = met.sums.reshape(-1, n_columns)
    count = met.counts[matrix * len(met.counts) // len(by_matrix)]
    return np.ascontiguousarray(by_matrix[matrix] / count) if count > 0 else None


class _List:
    """Reading the older kind forwards."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._data = path.read_bytes()
        self._pos = 0

    @property
    def at_end(self) -> bool:
        return self._pos == len(self._data)

    def count(self, what: str) -> int:
        value: int = struct.unpack("<i", self.take(4, what))[0]
        if value < 0:
            self.fail(what)
        return value

    def text(self, what: str) -> str:
        length = self.count(what)
        if length > _NAME_LIMIT_BYTES:
            self.fail(what)
        return self.take(length, what).decode(errors="replace")

    def take(self, count: int, what: str) -> bytes:
        data = self._data[self._pos : self._pos + count]
        if len(data) < count:
            self.fail(what)
        self._pos += count
        return data

    def fail(self, what: str) -> NoReturn:
        raise ModelError(
            f"{self._path}: {what}, byte {self._pos}: found no importance; accepted: a file of "
            "importance, as GGUF or in the list format before it"
        )


def _read_list(path: Path) -> Importance:
    data = _List(path)
    weights: dict[str, InputSums] = {}
    for index in range(data.count("number of entries")):
        name = data.text(f"name of entry {index}")
        calls = data.count(f"calls of {name!r}")
        values = data.take(4 * data.count(f"length of {name!r}"), f"numbers of {name!r}")
        sums = np.frombuffer(values, "<f4").astype(np.float32)
        if not (np.isfinite(sums).all() and (sums >= 0).all()):
            raise ModelError(
                f"{path}: importance of {name!r} is negative or not finite somewhere; accepted: "
                "mean squares"
            )
        weights[name] = InputSums(sums.reshape(1, -1), np.array([max(calls, 1)], np.float32))
    if not weights:
        data.fail("number of entries")
    n_chunks = 0 if data.at_end else data.count("number of chunks")
    texts = () if data.at_end else (data.text("name of the text"),)
    return Importance(weights, texts, n_chunks, 0)
