"""Making the bytes of a tensor piece by piece, each from a bounded part of the checkpoint.

A piece is a run of rows, of one expert where experts are stacked, or a run of heads of k_b and
v_b. Pieces do not depend on each other: any thread makes any of them at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mla_backend import _core

from ..errors import FormatError, ModelError
from ..gguf.writer import NewTensor
from .decode import SAME_FORMAT, Floats, Source, read_bits, read_floats
from .names import Transform

Bytes = npt.NDArray[np.uint8]
#: Numbers of a piece. As float32 with what they are made of and from, that is some 50 MB a thread,
#: and enough work that handing it out costs nothing.
PIECE_ELEMS: Final = 4 << 20
_F16_MAX: Final = 65504.0


@dataclass(frozen=True)
class Piece:
    """A run of bytes of one tensor.

    Attributes:
        tensor: which tensor, as its place in the plan.
        offset: first byte within the tensor.
        n_bytes: how many.
        source: which source of the tensor it is made of.
        first, count: entries of that source's outermost dimension, or heads of k_b and v_b.
    """

    tensor: int
    offset: int
    n_bytes: int
    source: int
    first: int
    count: int


@dataclass(frozen=True)
class Recipe:
    """How one tensor is made: its place in the file, the sources and what is done to them.

    Attributes:
        target: name, format and shape in the file.
        sources: of stacked experts one each, else a single one.
        transform: see ``names.Transform``.
        d_nope: rows of k_b in each head of the joint matrix.
    """

    target: NewTensor
    sources: tuple[Source, ...]
    transform: Transform = "rows"
    d_nope: int = 0

    @property
    def n_head(self) -> int:
        """Heads, of k_b and v_b."""
        return self.target.shape[0]

    @property
    def head_rows(self) -> int:
        """Rows of each head in the joint matrix."""
        return self.sources[0].tensor.shape[0] // self.n_head

    @property
    def is_copy(self) -> bool:
        """The checkpoint has the numbers as the file has them."""
        return all(
            SAME_FORMAT.get(source.tensor.dtype) == self.target.format for source in self.sources
        )


def cut(recipe: Recipe, tensor: int) -> Iterator[Piece]:
    """The pieces of a tensor in the order of its bytes."""
    by_head = recipe.transform in ("k_b", "v_b")
    n_entries = recipe.n_head if by_head else recipe.sources[0].tensor.shape[0]
    n_total = n_entries * len(recipe.sources)
    entry_bytes, rest = divmod(recipe.target.n_bytes, n_total)
    shape = recipe.target.shape
    if rest or (len(shape) == 1 and not by_head):  # vectors are one row
        n_entries_per_piece = n_entries
    else:
        entry_elems = prod(shape) // n_total
        n_entries_per_piece = max(1, PIECE_ELEMS // entry_elems)
    offset = 0
    for source in range(len(recipe.sources)):
        for first in range(0, n_entries, n_entries_per_piece):
            count = min(n_entries_per_piece, n_entries - first)
            n_bytes = count * entry_bytes
            yield Piece(tensor, offset, n_bytes, source, first, count)
            offset += n_bytes


def make(recipe: Recipe, piece: Piece) -> Bytes:
    """The bytes of one piece.

    Raises:
        OSError: the checkpoint cannot be read.
        ModelError: its numbers cannot be written in the tensor's format.
    """
    source = recipe.sources[piece.source]
    if recipe.is_copy:
        bits = np.ascontiguousarray(_arranged(recipe, piece, source, read_bits))
        return bits.reshape(-1).view(np.uint8)
    floats = np.ascontiguousarray(_arranged(recipe, piece, source, read_floats))
    return encode(floats.reshape(-1, recipe.target.shape[-1]), recipe.target).reshape(-1)


def encode(rows: Floats, target: NewTensor) -> Bytes:
    """Rows [n, K] as bytes [n, bytes per row], on the calling thread.

    Raises ModelError naming the tensor where its format cannot hold the numbers.
    """
    format = target.format
    if format == "F16" and rows.size and not bool((np.abs(rows) <= _F16_MAX).all()):
        raise ModelError(
            f"tensor {target.name!r} has numbers beyond what F16 holds; BF16 holds them"
        )
    try:
        encoded: Bytes = _core.quantize(rows, format, threads=1)
    except FormatError as error:
        raise ModelError(f"tensor {target.name!r}: {error}") from error
    return encoded


def _arranged(
    recipe: Recipe,
    piece: Piece,
    source: Source,
    read: Callable[[Source, int, int], npt.NDArray[Any]],
) -> npt.NDArray[Any]:
    if recipe.transform in ("rows", "stack"):
        return read(source, piece.first, piece.count)
    rows = recipe.head_rows
    joint = read(source, piece.first * rows, piece.count * rows)
    return half(joint.reshape(piece.count, rows, -1), recipe.transform, recipe.d_nope)


def half(joint: npt.NDArray[Any], transform: Transform, d_nope: int) -> npt.NDArray[Any]:
    """A half of heads [h, N+V, C]: k_b [h, C, N], transposed, or v_b [h, V, C]."""
    if transform == "k_b":
        return joint[:, :d_nope].swapaxes(1, 2)
    return joint[:, d_nope:]
