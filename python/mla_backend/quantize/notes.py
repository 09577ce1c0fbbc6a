"""What a user should know before a file is quantized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from ..convert.folding import folded
from ..formats import by_name
from .overrides import Override
from .step import Step

#: Below this many bits per weight, numbers are too coarse to treat all columns alike.
_LOW_BITS: Final = 4.0


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
