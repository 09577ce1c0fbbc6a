"""The best logits of a row: mostly all that choosing a token takes.

A device finds them, so that a token costs a copy of a few hundred bytes and not of the whole row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

FloatArray = np.ndarray[Any, np.dtype[np.float32]]

#: Candidates of a row, where the vocabulary has as many: more than the usual top-k of 40.
N_CANDIDATES: Final = 64


@dataclass(frozen=True, slots=True)
class Candidates:
    """The best of a row of ``n_vocab`` logits.

    Attributes:
        ids: int32 [k], those of the largest logits, the lower id first among equals.
        values: float32 [k], their logits, falling.
        total: sum of e^(logit - values[0]) over the whole row, as exact as float32 is; NaN where
            the row has a NaN or its largest is infinite.
    """

    ids: np.ndarray[Any, np.dtype[np.int32]]
    values: FloatArray
    total: float
    n_vocab: int


#: Candidates, or all logits, float32 [vocab].
LogitsRow = Candidates | FloatArray
#: Whether the candidates of a row are all that is wanted of it.
Enough = Callable[[Candidates], bool]
