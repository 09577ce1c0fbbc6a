"""Pictures of measurements. They need matplotlib, which the extra ``plot`` brings."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from mla_backend.benchmark import OURS, Measurement
from mla_backend.errors import UnsupportedError, UsageError

#: Endings of the files that can be written.
ENDINGS: Final = (".png", ".svg", ".pdf")
_INCHES: Final = (11.0, 4.5)
_DOTS_PER_INCH: Final = 150


def check(path: Path) -> None:
    """Raise UsageError for another ending, UnsupportedError where matplotlib is missing."""
    if path.suffix.lower() not in ENDINGS:
        raise UsageError(f"plot {path}: accepted are files that end in {', '.join(ENDINGS)}")
    _figure_class()


def _figure_class() -> Any:
    try:
        # Without pyplot: it keeps a window system and a list of figures.
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise UnsupportedError(
            f"plots need matplotlib: {error}; it is there after pip install 'mla_backend[plot]'"
        ) from None


def draw(path: Path, measurements: Sequence[Measurement], title: str) -> None:
    """Write one picture: tokens per second against context, decode beside prefill.

    Every program and mode of attention is a curve; prompt lengths are curves of their own.
    """
    figure = _figure_class()(figsize=_INCHES, layout="constrained")
    figure.suptitle(title)
    phases = [p for p in ("decode", "prefill") if any(m.phase == p for m in measurements)]
    for i, phase in enumerate(phases):
        axes = figure.add_subplot(1, len(phases), i + 1)
        rows = [m for m in measurements if m.phase == phase]
        lengths = {m.n_tokens for m in rows} if phase == "prefill" else set()
        for label, curve in _curves(rows, several_lengths=len(lengths) > 1).items():
            style = "-" if label.startswith(OURS) else "--"
            axes.plot([m.depth for m in curve], [m.tps for m in curve], f"o{style}", label=label)
        axes.set_title(phase if len(lengths) != 1 else f"prefill of {lengths.pop()} tokens")
        axes.set_xlabel("context before (tokens)")
        axes.set_ylabel("tokens/s")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=_DOTS_PER_INCH)


def _curves(rows: Sequence[Measurement], *, several_lengths: bool) -> dict[str, list[Measurement]]:
    """Points by the name of their curve, in order of depth."""
    curves: dict[str, list[Measurement]] = {}
    for row in sorted(rows, key=lambda m: m.depth):
        label = row.program if row.mode is None else f"{row.program} {row.mode}"
        if several_lengths:
            label += f", {row.n_tokens} tokens"
        curves.setdefault(label, []).append(row)
    return curves
