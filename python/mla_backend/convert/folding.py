"""Long lists of similar texts in few lines: what differs only in the layer or the expert is one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import prod
from typing import Final

#: The number of a layer or an expert within a tensor's name.
_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.)")


def folded(texts: Iterable[str]) -> list[str]:
    """Texts that differ only in numbers between dots as one, in order of their first.

    ``blk.0.ffn_up.weight`` and ``blk.1.ffn_up.weight`` become ``blk.{0-1}.ffn_up.weight``. The
    number of texts follows where it is not that of all combinations. Repetitions count once.
    """
    groups: dict[tuple[str, ...], list[list[int]]] = {}
    for text in dict.fromkeys(texts):
        numbers = [int(number) for number in _NUMBER.findall(text)]
        groups.setdefault(tuple(_NUMBER.split(text)), []).append(numbers)
    return [_as_one(parts, rows) for parts, rows in groups.items()]


def _as_one(parts: Sequence[str], rows: Sequence[Sequence[int]]) -> str:
    places = [sorted(set(column)) for column in zip(*rows, strict=True)]
    text = parts[0]
    for part, numbers in zip(parts[1:], places, strict=True):
        text += _ranges(numbers) + part
    complete = prod(map(len, places)) == len(rows)
    return text if complete else f"{text} ({len(rows)} of these)"


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers: ``7`` or ``{0-3,7}``."""
    if len(numbers) == 1:
        return str(numbers[0])
    starts = [numbers[0], *(b for a, b in pairwise(numbers) if b != a + 1)]
    ends = [*(a for a, b in pairwise(numbers) if b != a + 1), numbers[-1]]
    parts = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    return "{" + ",".join(parts) + "}"
