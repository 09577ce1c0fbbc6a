"""What the model has to beat: an n-gram model and xz, on the same held-out files.

The n-gram model is interpolated Kneser-Ney with three discounts per order (Chen and Goodman):
``p(w | h) = max(c(hw) - D, 0) / c(h) + gamma(h) p(w | h')``, where orders below the highest count
the distinct tokens that precede.
"""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Keys = NDArray[np.uint64]
_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Order:
    """Counts of one order: sorted keys and contexts, and what each contributes."""

    keys: _Keys
    discounted: _Floats
    contexts: _Keys
    totals: _Floats
    backoff: _Floats


class KneserNey:
    """An n-gram model over ids below ``2 ** bits``; ``order * bits`` must not exceed 64."""

    def __init__(self, streams: Sequence[NDArray[np.integer]], bits: int, order: int = 5) -> None:
        if bits * order > 64:
            raise ValueError(f"KneserNey: {order} ids of {bits} bits; accepted: 64 bits in all")
        self._bits, self._n = bits, order
        grams = np.concatenate([self._grams(stream) for stream in streams])
        keys, counts = np.unique(grams, return_counts=True)
        self._orders = [self._fit(keys, counts)]
        for n in range(order - 1, 0, -1):
            mask = np.uint64((1 << bits * n) - 1)
            keys, counts = np.unique(keys & mask, return_counts=True)
            self._orders.append(self._fit(keys, counts))

    def bits_of(self, stream: NDArray[np.integer]) -> float:
        """Bits that one document (ids [n]) takes."""
        grams = self._grams(stream)
        p = np.full(len(grams), 2.0**-self._bits)
        for n, order in zip(range(1, self._n + 1), reversed(self._orders), strict=True):
            keys = grams & np.uint64((1 << self._bits * n) - 1) if n * self._bits < 64 else grams
            context, known = _find(order.contexts, keys >> np.uint64(self._bits))
            total = order.totals[context]
            found, hit = _find(order.keys, keys)
            own = np.where(hit, order.discounted[found], 0.0)
            p = np.where(known, own / total + order.backoff[context] * p, p)
        return float(-np.log2(p).sum())

    def _grams(self, stream: NDArray[np.integer]) -> _Keys:
        ids = np.concatenate([np.zeros(self._n - 1, np.uint64), stream.astype(np.uint64)])
        key = np.zeros(len(stream), np.uint64)
        for i in range(self._n):
            key = (key << np.uint64(self._bits)) | ids[i : i + len(stream)]
        return key

    def _fit(self, keys: _Keys, counts: NDArray[np.integer]) -> _Order:
        n1, n2, n3, n4 = (max(1, int((counts == k).sum())) for k in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        steps = np.clip([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3], 0, 3)
        taken = steps[np.minimum(counts, 3)]
        contexts, first = np.unique(keys >> np.uint64(self._bits), return_index=True)
        totals = np.add.reduceat(counts.astype(np.float64), first)
        backoff = np.add.reduceat(taken, first) / totals
        return _Order(keys, counts - taken, contexts, totals, backoff)


def _find(table: _Keys, keys: _Keys) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return at, table[at] == keys


def xz_bits(held: bytes, trained: bytes = b"") -> int:
    """Bits that ``xz -9e`` needs for the held-out text, after the training text if one is given.

    The dictionary is as large as both together, so that all of the training text is in reach.
    """
    size = max(1 << 26, 1 << (len(held) + len(trained)).bit_length())
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": size}]
    both = len(lzma.compress(trained + held, filters=filters))
    return 8 * (both - (len(lzma.compress(trained, filters=filters)) if trained else 0))
