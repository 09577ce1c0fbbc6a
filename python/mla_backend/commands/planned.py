"""What ``convert`` and ``quantize`` do with their plans: show them, or carry them out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .console import Console, write_json, write_stdout
from .options import ConsoleOptions, JsonOptions
from .output_file import FilePlan, OutputOptions, check_new, write_files
from .units import bytes_text, duration_text


class NotedPlan(FilePlan, Protocol):
    """A plan with what the user should know of it."""

    @property
    def notes(self) -> tuple[str, ...]:
        """One line each."""


@dataclass(frozen=True)
class Shown:
    """What one command says of its plan beside what all plans have.

    Attributes:
        type: the file type.
        source_bytes: bytes that are read.
        details: a line per tensor.
        estimate: gives the seconds that it will take.
        remark: follows the type.
        facts: JSON keys of the command's own.
    """

    type: str
    source_bytes: int
    details: Sequence[str]
    estimate: Callable[[], float]
    remark: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)


def show_or_write(
    plan: NotedPlan,
    shown: Shown,
    *,
    dry_run: bool,
    file: OutputOptions,
    output: JsonOptions,
    console: ConsoleOptions,
) -> None:
    """Print a plan for ``dry_run``, else carry it out and print the names of the files."""
    if not dry_run:
        check_new(plan.output.paths, force=file.force)
    printer = Console(console, as_json=output.as_json)
    printer.notes(plan.notes)
    if dry_run:
        seconds = shown.estimate()
        if output.as_json:
            write_json(_as_json(plan, shown) | {"seconds": round(seconds, 3), "written": False})
        else:
            lines = _lines(plan, shown, seconds, verbose=console.verbose)
            write_stdout("".join(f"{line}\n" for line in lines))
        return
    write_files(printer, plan)
    if output.as_json:
        write_json(_as_json(plan, shown) | {"written": True})
    else:
        write_stdout("".join(f"{path}\n" for path in plan.output.paths))


def _as_json(plan: NotedPlan, shown: Shown) -> dict[str, object]:
    return {
        "paths": [str(path) for path in plan.output.paths],
        "type": shown.type,
        "n_bytes": plan.output.n_bytes,
        "source_bytes": shown.source_bytes,
        **shown.facts,
        "formats": {
            format: {"tensors": count, "bytes": n_bytes}
            for format, (count, n_bytes) in plan.output.formats().items()
        },
        "notes": list(plan.notes),
    }


def _lines(plan: NotedPlan, shown: Shown, seconds: float, *, verbose: bool) -> Iterator[str]:
    for shard in plan.output.shards:
        yield f"{bytes_text(shard.layout.n_bytes):>10}  {shard.path}"
    yield f"type {shown.type}{shown.remark}, {len(plan.output.tensors)} tensors:"
    for format, (count, n_bytes) in plan.output.formats().items():
        yield f"  {format:8} {count:5}  {bytes_text(n_bytes):>10}"
    if verbose:
        yield from shown.details
    yield (
        f"reads {bytes_text(shown.source_bytes)}, takes about {duration_text(seconds)} "
        f"on {plan.n_threads} threads"
    )
