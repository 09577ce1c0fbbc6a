"""What the commands that write a model have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from ..errors import UsageError
from .console import Console
from .sizes import parse_size

if TYPE_CHECKING:
    from ..convert.output import OutputPlan
    from ..convert.pieces import Bytes, Piece


@dataclass(frozen=True)
class OutputOptions:
    """How files are written."""

    split_max_size: Annotated[
        str | None,
        typer.Option(
            "--split-max-size",
            metavar="N[M|G]",
            show_default=False,
            help="Split into files of at most this much.",
        ),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option("-t", "--threads", min=1, show_default=False, help="Threads, else the cores."),
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False

    @property
    def max_shard_bytes(self) -> int | None:
        """Where to split, None to write one file."""
        size = self.split_max_size
        return None if size is None else parse_size(size, "--split-max-size")


class FilePlan(Protocol):
    """What can be carried out: the files, and how their pieces are made."""

    @property
    def output(self) -> OutputPlan:
        """The files."""

    @property
    def n_threads(self) -> int:
        """Threads that will work."""

    def make(self, piece: Piece) -> Bytes:
        """The bytes of one piece."""


def check_new(paths: Sequence[Path], *, force: bool) -> None:
    """Raise UsageError where a path cannot be written, or exists and ``force`` is not given."""
    for path in paths:
        if not path.parent.is_dir():
            raise UsageError(f"{path.parent} is no directory; accepted: one that exists")
        if path.exists() and not path.is_file():
            kind = "a directory" if path.is_dir() else "no ordinary file"
            raise UsageError(f"{path} is {kind}; accepted: the name of a file")
        if path.exists() and not force:
            raise UsageError(f"{path} exists; --force replaces it")


def write_files(printer: Console, plan: FilePlan) -> None:
    """Carry out a plan with a progress line."""
    from ..convert.output import write_output

    with _resumable(printer, plan.output):
        write_output(plan.output, plan.make, plan.n_threads, printer.progress)
    printer.progress.clear()


@contextmanager
def _resumable(printer: Console, plan: OutputPlan) -> Iterator[None]:
    """Say that the work can go on, where it is interrupted with something to go on from."""
    if plan.journal.exists():
        printer.note("going on with the unfinished file of an earlier run")
    try:
        yield
    except (KeyboardInterrupt, OSError):
        if plan.journal.exists():
            printer.note(
                "unfinished: the same command goes on from here "
                f"(what is done lies in {plan.shards[0].partial})"
            )
        raise
