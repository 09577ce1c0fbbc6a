"""``bench``: rates of a model beside the machine's limits, by depth, and beside other programs."""

from __future__ import annotations

import re
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ..errors import UsageError
from .console import Console, write_json, write_stdout
from .loading import check_place, load_model, model_facts
from .options import Attention, ConsoleOptions, ContextOptions, ModelOptions, ModelPath

if TYPE_CHECKING:
    from ..benchmark import Bench, Cases, Measurement
    from ..peers import Peer

_DEPTHS: Final = "0"
_SWEEP_DEPTHS: Final = "0,1024,2048,4096,8192,16384"
_NUMBERS = re.compile(r"\d+(,\d+)*")


class Output(StrEnum):
    """How results are printed."""

    md = "md"
    json = "json"
    csv = "csv"


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, and how it is shown."""

    prompts: Annotated[
        str, typer.Option("-p", "--n-prompt", metavar="N,..", help="Tokens of prefill; 0: none.")
    ] = "512"
    n_gen: Annotated[
        int, typer.Option("-n", "--n-gen", min=0, metavar="N", help="Tokens of decode; 0: none.")
    ] = 64
    depths: Annotated[
        str | None,
        typer.Option(
            "-d",
            "--n-depth",
            metavar="N,..",
            show_default=False,
            help=f"Positions cached before; unset: {_DEPTHS}, with --sweep {_SWEEP_DEPTHS}.",
        ),
    ] = None
    repeats: Annotated[
        int, typer.Option("-r", "--repeats", min=1, metavar="N", help="Rates are medians of these.")
    ] = 3
    output: Annotated[
        Output, typer.Option("-o", "--output", help="A table, one JSON object, or a CSV table.")
    ] = Output.md
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            show_default=False,
            help="Draw rates against depth too (png, svg, pdf); needs matplotlib.",
        ),
    ] = None
    sweep: Annotated[
        bool, typer.Option("--sweep", help="All modes of attention at many depths.")
    ] = False
    peer: Annotated[
        list[str] | None,
        typer.Option(
            "--peer",
            metavar="NAME",
            show_default=False,
            help="Measure this too, in turns: llama-cpp-python. May be repeated.",
        ),
    ] = None
    peer_python: Annotated[
        str,
        typer.Option(
            "--peer-python",
            metavar="FILE",
            show_default=False,
            help="Interpreter that has the peer; unset: this one.",
        ),
    ] = sys.executable

    def cases(self) -> Cases:
        """What is to be measured. Raises UsageError."""
        from ..benchmark import Cases

        depths = self.depths or (_SWEEP_DEPTHS if self.sweep else _DEPTHS)
        return Cases(_numbers(self.prompts, "-p"), self.n_gen, _numbers(depths, "-d"), self.repeats)


def bench(
    path: ModelPath,
    options: BenchOptions,
    context: ContextOptions,
    model_options: ModelOptions,
    console_options: ConsoleOptions,
) -> None:
    """Measure prefill and decode rates of a model."""
    from ..benchmark import SWEEP_MODES, Bench

    cases = options.cases()
    if options.sweep and model_options.attention is not Attention.auto:
        raise UsageError("--sweep measures all modes of attention; --attention names one")
    _check_plot(options.plot)
    console = Console(console_options, as_json=options.output is Output.json)
    context = replace(context, ctx_size=context.ctx_size or cases.n_ctx)
    with ExitStack() as stack:
        peers = _start_peers(options, stack)
        model = stack.enter_context(load_model(path.path, context, model_options, console))
        for peer in peers:
            peer.load(
                path.path,
                n_ctx=cases.n_ctx,
                threads=model.n_threads,
                n_batch=model.n_batch,
                on_gpu=model.attention_isa == "cuda",
                has_query_latent=model.config.q_lora_rank is not None,
            )
        machine = Bench(model, peers)
        console.notes(machine.notes)
        facts = model_facts(model, context, model_options)
        modes = SWEEP_MODES if options.sweep else None
        measured = machine.measure(cases, modes, console.progress)
    console.progress.clear()
    _show(options, facts, machine, measured)


def _numbers(text: str, option: str) -> list[int]:
    if not _NUMBERS.fullmatch(text):
        raise UsageError(f"{option} {text!r}; accepted are numbers, as in 512,4096")
    return [int(part) for part in text.split(",")]


def _check_plot(path: Path | None) -> None:
    """Raise, before anything is loaded, where no picture could be written."""
    if path is not None:
        from ..plots import check

        check_place(path)
        check(path)


def _start_peers(options: BenchOptions, stack: ExitStack) -> list[Peer]:
    """Their processes, without models: what is missing is known before anything is loaded."""
    from ..peers import Peer

    return [
        stack.enter_context(Peer(name, options.peer_python))
        for name in dict.fromkeys(options.peer or ())
    ]


def _show(
    options: BenchOptions,
    facts: dict[str, object],
    machine: Bench,
    measured: list[Measurement],
) -> None:
    from dataclasses import asdict

    from .bench_tables import csv_table, markdown

    if options.output is Output.json:
        write_json(
            {
                "model": facts,
                "devices": machine.devices,
                "limits": asdict(machine.limits) if machine.limits else None,
                "energy": machine.meter.sources,
                "load_average": machine.load_average,
                "repeats": options.repeats,
                "results": [asdict(m) for m in measured],
                "notes": machine.notes,
            }
        )
    elif options.output is Output.csv:
        write_stdout(csv_table(measured))
    else:
        write_stdout(markdown(measured, machine, facts, options.repeats))
    if options.plot is not None:
        from ..plots import draw

        draw(options.plot, measured, _title(facts, machine))


def _title(facts: dict[str, object], machine: Bench) -> str:
    limits = machine.limits
    name = facts["name"] or Path(str(facts["path"])).name
    where = "+".join(machine.devices) if limits is None else limits.name
    threads = f", {limits.threads} threads" if limits is not None and limits.threads else ""
    return f"{name} on {where}{threads}"
