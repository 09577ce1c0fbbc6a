"""``synth``: a random model of a given shape, for trying and measuring."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .console import Console, write_json, write_stdout
from .options import ConsoleOptions, JsonOptions, Layout


@dataclass(frozen=True)
class SynthOptions:
    """Which model to make."""

    shape: Annotated[
        str, typer.Argument(metavar="SHAPE", help="tiny-v2, tiny-v3, v2-lite, v3 and others.")
    ]
    out: Annotated[Path, typer.Argument(metavar="OUT", help="GGUF file to write.")]
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


def synth(options: SynthOptions, output: JsonOptions, console: ConsoleOptions) -> None:
    """Write a model of random weights: real shapes, meaningless text."""
    from ..errors import UsageError
    from ..synth import shape_named, write_model

    if options.out.exists() and not options.force:
        raise UsageError(f"{options.out} exists; --force replaces it")
    shape = shape_named(
        options.shape, layers=options.layers, experts=options.experts, vocab=options.vocab
    )
    printer = Console(console, as_json=output.as_json)
    paths = write_model(
        options.out,
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
