"""``tune``: the fastest settings of a model on this machine, found and kept."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ..errors import UsageError
from .console import Console, write_json, write_stdout
from .options import ConsoleOptions, JsonOptions, ModelPath

if TYPE_CHECKING:
    from ..tuning import Trial, Tuning


_BUSY_LOAD: Final = 0.5


@dataclass(frozen=True)
class TuneOptions:
    """What becomes of the result."""

    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what is fastest and keep nothing.")
    ] = False


def tune(
    path: ModelPath, options: TuneOptions, output: JsonOptions, console_options: ConsoleOptions
) -> None:
    """Find and keep the fastest threads and batch size of a model on this machine."""
    from ..tuned import TunedFile
    from ..tuning import tune as find

    console = Console(console_options, as_json=output.as_json)
    if (load := os.getloadavg()[0]) > _BUSY_LOAD:
        console.note(f"note: load average {load:.1f}: other work makes rates lower and less sure")
    file = TunedFile()
    if file.path is None and not options.dry_run:
        raise UsageError(f"{file.problem}, or use --dry-run")
    if file.problem:
        console.note(f"note: {file.problem}")
    found = find(path.path, console.progress)
    console.progress.clear()
    if not options.dry_run:
        file.store(found.model, found.settings)
    if output.as_json:
        facts = {"machine": file.machine, "model": found.model, "stored": not options.dry_run}
        trials = [asdict(trial) for trial in found.trials]
        write_json({**facts, **asdict(found.settings), "path": str(file.path), "trials": trials})
        return
    write_stdout("".join(f"{line}\n" for line in _lines(found)))
    if not options.dry_run:
        console.note(f"kept in {file.path}; --no-tuned ignores it")


def _lines(found: Tuning) -> Iterator[str]:
    yield "| setting | value | prefill tokens/s | decode tokens/s | at depth | best |"
    yield "|---|---:|---:|---:|---:|---|"
    yield from map(_row, found.trials)
    settings = found.settings
    threads = f"threads {settings.threads}, " if settings.threads is not None else ""
    yield ""
    yield f"{threads}batch {settings.n_batch}"
    if settings.cache_type != "f16":
        yield f"-ctk {settings.cache_type} decodes faster at depth; it is never used unasked"


def _row(trial: Trial) -> str:
    prefill = "" if trial.prefill_tps is None else f"{trial.prefill_tps:.1f}"
    decode = "" if trial.decode_tps is None else f"{trial.decode_tps:.2f}"
    best = "*" if trial.is_best else ""
    return f"| {trial.what} | {trial.value} | {prefill} | {decode} | {trial.depth} | {best} |"
