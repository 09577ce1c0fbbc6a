"""What a user should know before a file is quantized."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from ..formats import by_name
from .overrides import Override

if TYPE_CHECKING:
    from .plan import Step

#: Below this many bits per weight, numbers are too coarse to treat all columns alike.
_LOW_BITS: Final = 4.0
_LAYER: Final = re.compile(r"blk\.(\d+)\.(.*)")


def notes_on(
    steps: Sequence[Step], overrides: Sequence[Override], *, has_importance: bool
) -> Iterator[str]:
    """One line per thing, tensors by name."""
    low = [s for s in steps if not s.is_copy and _bits(s.target.format) < _LOW_BITS]
    if not has_importance:
        if low:
            formats = sorted({step.target.format for step in low})
            yield f"{' and '.join(formats)}: numbers lose much without importance (--imatrix)"
    else:
        missing = [step.target.name for step in low if step.inputs is None]
        if missing:
            yield f"no importance for {', '.join(folded(missing))}, in formats of few bits"
        yield from _unseen(steps)
    for entry in overrides:
        if not any(entry.pattern.search(step.target.name) for step in steps):
            yield f"no tensor is called {entry.pattern.pattern!r}"


def _unseen(steps: Sequence[Step]) -> Iterator[str]:
    """Experts that no token of the text reached."""
    for step in steps:
        if step.inputs is None or step.is_copy or not step.inputs.unseen():
            continue
        yield (
            f"{step.target.name}: nothing met {len(step.inputs.unseen())} of "
            f"{len(step.inputs.counts)} matrices; their columns count alike"
        )


def _bits(format: str) -> float:
    row = by_name(format)
    return 8 * row.block_bytes / row.block_elems


def folded(names: Iterable[str]) -> list[str]:
    """Names that differ only in the layer as one: ``blk.{0-3,7}.ffn_up.weight``."""
    layers: dict[str, list[int]] = defaultdict(list)
    others: list[str] = []
    for name in names:
        match = _LAYER.fullmatch(name)
        if match is None:
            others.append(name)
        else:
            layers[match[2]].append(int(match[1]))
    return others + [f"blk.{_ranges(sorted(found))}.{rest}" for rest, found in layers.items()]


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    starts = [numbers[0], *(b for a, b in pairwise(numbers) if b != a + 1)]
    ends = [*(a for a, b in pairwise(numbers) if b != a + 1), numbers[-1]]
    parts = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    return "{" + ",".join(parts) + "}"
