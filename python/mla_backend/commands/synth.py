"""``synth``: a random model of a given shape, for trying and measuring."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .console import Console, write_json, write_stdout
from .options import ConsoleOptions, JsonOptions, Layout


@dataclass(frozen=True)
class SynthOptions:
    """Which model to make."""

    places: Annotated[
        list[Path],
        typer.Argument(metavar="[SHAPE] OUT", help="A shape, unless --shape has it, and a file."),
    ]
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            metavar="SHAPE",
            show_default=False,
            help="tiny-v2, tiny-v3, v2-lite, v3 and others.",
        ),
    ] = None
    type: Annotated[
        str, typer.Option("--type", metavar="TYPE", help="File type, such as q4_k_m or bf16.")
    ] = "q4_k_m"
    layout: Annotated[
        Layout, typer.Option("--layout", help="legacy is how files of 2024 store attn_kv_b.")
    ] = Layout.split
    seed: Annotated[int, typer.Option("-s", "--seed", min=0, help="Random seed.")] = 0
    shards: Annotated[int, typer.Option("--shards", min=1, help="Number of files.")] = 1
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, show_default=False, help="Layers in all.")
    ] = None
    experts: Annotated[
        int | None, typer.Option("--experts", min=0, show_default=False, help="Routed experts.")
    ] = None
    vocab: Annotated[
        int | None, typer.Option("--vocab", min=1, show_default=False, help="Token ids.")
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False

    def shape_and_out(self) -> tuple[str, Path]:
        """The name of the shape, from either place, and the file."""
        before = [] if self.shape is None else [self.shape]
        found = [*before, *map(str, self.places)]
        if len(found) != 2:
            raise UsageError(
                f"found {' '.join(found)!r}; accepted: --shape SHAPE OUT, or SHAPE OUT"
            )
        return found[0], Path(found[1])


def synth(options: SynthOptions, output: JsonOptions, console: ConsoleOptions) -> None:
    """Write a model of random weights: real shapes, meaningless text."""
    from ..synth import shape_named, write_model

    name, out = options.shape_and_out()
    if out.exists() and not options.force:
        raise UsageError(f"{out} exists; --force replaces it")
    shape = shape_named(name, layers=options.layers, experts=options.experts, vocab=options.vocab)
    printer = Console(console, as_json=output.as_json)
    paths = write_model(
        out,
        shape,
        type=options.type,
        layout=options.layout.value,
        seed=options.seed,
        shards=options.shards,
        on_progress=printer.progress,
    )
    printer.progress.clear()
    n_bytes = sum(path.stat().st_size for path in paths)
    if output.as_json:
        write_json({"paths": [str(path) for path in paths], "n_bytes": n_bytes})
    else:
        write_stdout("".join(f"{path}\n" for path in paths))
