"""Results of ``bench`` as tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..benchmark import Bench, Measurement
    from ..limits import Limits

_COLUMNS = {
    "phase": "---",
    "depth": "---:",
    "tokens": "---:",
    "program": "---",
    "attention": "---",
    "tokens/s": "---:",
    "spread": "---:",
    "GB/s": "---:",
    "TOPS": "---:",
    "of roofline": "---:",
}


def csv_table(measured: Sequence[Measurement]) -> str:
    """One line of names, and one per measurement; empty where a value cannot be known."""
    from ..benchmark import Measurement

    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Measurement)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(m) for m in measured)
    return text.getvalue()


def markdown(
    measured: Sequence[Measurement], machine: Bench, facts: dict[str, object], repeats: int
) -> str:
    """What was measured on what, and a table; columns that say nothing are left out."""
    with_energy = any(m.joules_per_token is not None for m in measured)
    with_ratio = len({(m.program, m.mode) for m in measured}) > 1
    columns = dict(_COLUMNS)
    if with_energy:
        columns["J/token"] = "---:"
    if with_ratio:
        columns["ratio"] = "---:"
    lines = [*_header(machine, facts, repeats), ""]
    lines += [_row(list(columns)), _row(list(columns.values())).replace(" ", "")]
    for m in measured:
        cells = _cells(m)
        if with_energy:
            cells.append("" if m.joules_per_token is None else f"{m.joules_per_token:.3g}")
        if with_ratio:
            cells.append(f"{m.ratio:.2f}")
        lines.append(_row(cells))
    return "".join(f"{line}\n" for line in lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _header(machine: Bench, facts: dict[str, object], repeats: int) -> Iterator[str]:
    name = facts["name"] or Path(str(facts["path"])).name
    yield (
        f"{name} on {'+'.join(machine.devices)}: cache {facts['cache_type']}, "
        f"precision {facts['precision']}, threads {facts['n_threads']}, {facts['isa']}; "
        f"medians of {repeats}, load average {machine.load_average:.1f}"
    )
    if machine.limits is not None:
        yield _limits_text(machine.limits)
    if machine.meter.sources:
        yield f"energy: {', '.join(machine.meter.sources)}"


def _limits_text(limits: Limits) -> str:
    if not limits.is_measured:
        return f"{limits.name}: memory {limits.read_gbps:.0f} GB/s by its clock and width"
    rates = {"float32": limits.f32_tops, "bfloat16": limits.bf16_tops, "int8": limits.int8_tops}
    known = ", ".join(f"{name} {tops:.3g}" for name, tops in rates.items() if tops)
    return f"{limits.name}: reads {limits.read_gbps:.1f} GB/s, multiplies {known} TOPS"


def _cells(m: Measurement) -> list[str]:
    attention = m.attention or ""
    if m.mode == "auto":
        attention = f"auto: {attention}"
    return [
        m.phase,
        str(m.depth),
        str(m.n_tokens),
        m.program,
        attention,
        f"{m.tps:.4g}" if m.tps < 1000 else f"{m.tps:.0f}",
        f"{m.spread:.0%}",
        f"{m.read_gbps:.3g}{_share(m.read_share)}",
        f"{m.tops:.3g}{_share(m.tops_share)}",
        "" if m.roofline_share is None else f"{m.roofline_share:.0%}",
    ]


def _share(share: float | None) -> str:
    return "" if share is None else f" ({share:.0%})"
