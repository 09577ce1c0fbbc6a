"""How long a conversion will take, from making small parts of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Final

from .pieces import Piece, Recipe, make

#: Numbers of a sample: enough to outweigh the start, few enough for a plan to come at once.
_SAMPLE_ELEMS: Final = 1 << 18
#: (type in the checkpoint, format in the file): what the cost of a number depends on.
_Kind = tuple[str, str]


def estimate(recipes: Sequence[Recipe], pieces: Sequence[Piece], n_threads: int) -> float:
    """Seconds for all pieces on ``n_threads`` threads, writing apart.

    A sample of each kind is read and made. Where the checkpoint is not in the page cache, the
    samples are dominated by its disk, and so is the estimate.
    """
    largest: dict[_Kind, Piece] = {}
    n_elems: Counter[_Kind] = Counter()
    for piece in pieces:
        recipe = recipes[piece.tensor]
        kind = (recipe.sources[0].tensor.dtype, recipe.target.format)
        n_elems[kind] += _elems(recipe, piece)
        best = largest.get(kind)
        if best is None or _elems(recipe, piece) > _elems(recipes[best.tensor], best):
            largest[kind] = piece
    seconds = sum(
        n_elems[kind] * _cost(recipes[piece.tensor], piece) for kind, piece in largest.items()
    )
    return seconds / n_threads


def _elems(recipe: Recipe, piece: Piece) -> int:
    """Numbers of a piece."""
    return prod(recipe.target.shape) * piece.n_bytes // recipe.target.n_bytes


def _cost(recipe: Recipe, piece: Piece) -> float:
    """Seconds per number, of a sample from the beginning of a piece."""
    count = max(1, min(piece.count, piece.count * _SAMPLE_ELEMS // _elems(recipe, piece)))
    n_bytes = piece.n_bytes * count // piece.count
    sample = replace(piece, count=count, n_bytes=n_bytes)
    started_s = time.perf_counter()
    make(recipe, sample)
    return (time.perf_counter() - started_s) / _elems(recipe, sample)
