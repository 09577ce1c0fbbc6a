"""Random weights as a stream of bytes, at the speed of copying.

One pool of normal numbers is rounded to each format and spread once; long rows are strung together
from pieces of the pool, drawn anew for every tensor. Short rows would repeat each other that way,
and are few, so their numbers are drawn one by one. All formats draw alike: files of one seed hold
one model, rounded differently.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .. import _core
from ..formats import by_name
from ..gguf.writer import Chunk
from .tensors import Plan

#: Numbers in the pool. With pieces of 256 two rows share a piece in place once in 2048 times.
_POOL_ELEMS = 1 << 19
#: Longest piece: the largest block of any format, so that a piece is a whole number of blocks.
_PIECE_ELEMS = 256
#: Rows of fewer pieces are drawn in full.
_MIN_PIECES = 4
_CHUNK_BYTES = 16 << 20

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


class WeightSource:
    """Random weights of a whole model; equal seeds give equal bytes."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._pool = np.random.default_rng(seed).standard_normal(_POOL_ELEMS, dtype=np.float32)
        self._encoded: dict[tuple[str, int, float], Bytes] = {}

    def chunks(self, plan: Plan) -> Iterator[Chunk]:
        """The bytes of one tensor in pieces."""
        if _is_short(plan):
            for rows in self._drawn(plan):
                yield encode(rows, plan.format)
            return
        piece = _piece_elems(plan)
        pool = self._pieces(plan.format, piece, plan.std)
        picks = self._picks(plan, piece)
        step = max(1, _CHUNK_BYTES // pool.shape[1])
        for start in range(0, len(picks), step):
            yield np.take(pool, picks[start : start + step], axis=0)

    def floats(self, plan: Plan) -> Floats:
        """The numbers of one tensor before rounding, in its shape."""
        if _is_short(plan):
            return np.concatenate(list(self._drawn(plan))).reshape(plan.shape)
        piece = _piece_elems(plan)
        pool = self._usable(piece) * np.float32(plan.std)
        return pool.reshape(-1, piece)[self._picks(plan, piece)].reshape(plan.shape)

    def joint_kv_b(self, plan: Plan, key: Plan, value: Plan) -> Iterator[Chunk]:
        """The legacy matrix [H*(N+V), C] that holds what the split tensors would hold."""
        by_head = np.concatenate([self.floats(key).swapaxes(1, 2), self.floats(value)], axis=1)
        for head in by_head:
            yield encode(head, plan.format)

    def _drawn(self, plan: Plan) -> Iterator[Floats]:
        """Rows of a tensor, a few at a time."""
        generator = self._generator(plan)
        n_rows = math.prod(plan.shape[:-1])
        step = max(1, _POOL_ELEMS // plan.shape[-1])
        for start in range(0, n_rows, step):
            size = (min(step, n_rows - start), plan.shape[-1])
            drawn = generator.standard_normal(size, dtype=np.float32)
            yield drawn * np.float32(plan.std) + np.float32(plan.mean)

    def _generator(self, plan: Plan) -> np.random.Generator:
        return np.random.default_rng([self._seed, zlib.crc32(plan.name.encode())])

    def _usable(self, piece: int) -> Floats:
        return self._pool[: _POOL_ELEMS // piece * piece]

    def _picks(self, plan: Plan, piece: int) -> npt.NDArray[np.int32]:
        n_pieces = math.prod(plan.shape) // piece
        return self._generator(plan).integers(
            0, _POOL_ELEMS // piece, size=n_pieces, dtype=np.int32
        )

    def _pieces(self, format: str, piece: int, std: float) -> Bytes:
        """The pool at this spread, rounded to the format: [pieces, bytes per piece]."""
        key = (format, piece, std)
        if key not in self._encoded:
            floats = (self._usable(piece) * np.float32(std)).reshape(-1, piece)
            self._encoded[key] = encode(floats, format)
        return self._encoded[key]


def _is_short(plan: Plan) -> bool:
    return len(plan.shape) == 1 or plan.shape[-1] < _MIN_PIECES * _PIECE_ELEMS


def _piece_elems(plan: Plan) -> int:
    return math.gcd(plan.shape[-1], _PIECE_ELEMS)


def encode(values: Floats, format: str) -> Bytes:
    """Values [.., K] rounded to a format, as bytes [.., bytes per row]."""
    if by_name(format).quantized:
        rows: Bytes = _core.quantize(np.ascontiguousarray(values), format)
        return rows
    dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[format]
    return np.ascontiguousarray(values).astype(dtype).view(np.uint8)
