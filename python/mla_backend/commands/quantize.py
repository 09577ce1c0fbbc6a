"""``quantize``: a GGUF file becomes a smaller one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import ConsoleOptions, JsonOptions
from .output_file import OutputOptions
from .planned import Shown, show_or_write

if TYPE_CHECKING:
    from ..quantize import QuantizePlan


@dataclass(frozen=True)
class QuantizeOptions:
    """What to quantize, and how."""

    model: Annotated[
        Path, typer.Argument(metavar="IN", help="GGUF file; of a split one, any part.")
    ]
    out: Annotated[Path, typer.Argument(metavar="OUT", help="GGUF file to write.")]
    type: Annotated[
        str, typer.Argument(metavar="TYPE", help="File type such as q4_k_m, q8_0, iq4_xs.")
    ]
    imatrix: Annotated[
        Path | None,
        typer.Option(
            "--imatrix", metavar="FILE", show_default=False, help="Importance of the columns."
        ),
    ] = None
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            "--tensor-type",
            metavar="PATTERN=TYPE",
            show_default=False,
            help="Format of matrices by name, such as ffn_down_exps=q3_k; the first match counts.",
        ),
    ] = None
    allow_requantize: Annotated[
        bool,
        typer.Option("--allow-requantize", help="Also quantize what is quantized already."),
    ] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the plan, write nothing.")
    ] = False


def quantize(
    options: QuantizeOptions, file: OutputOptions, output: JsonOptions, console: ConsoleOptions
) -> None:
    """Quantize a GGUF file, by importance where there is some.

    An interrupted quantization goes on where it stopped when the same command is given again.
    """
    from ..quantize import estimate_seconds, parse_override, plan_quantization

    plan = plan_quantization(
        options.model,
        options.out,
        options.type,
        imatrix=options.imatrix,
        overrides=[parse_override(text) for text in options.tensor_type or ()],
        allow_requantize=options.allow_requantize,
        max_shard_bytes=file.max_shard_bytes,
        threads=file.threads,
    )
    bits = plan.bits_per_weight()
    shown = Shown(
        type=plan.type,
        source_bytes=plan.file.n_bytes,
        details=list(_details(plan)),
        estimate=lambda: estimate_seconds(plan),
        remark=f", {bits:.2f} bits per weight",
        facts={"bits_per_weight": round(bits, 3)},
    )
    show_or_write(plan, shown, dry_run=options.dry_run, file=file, output=output, console=console)


def _details(plan: QuantizePlan) -> Iterator[str]:
    for step in plan.steps:
        change = f"{step.source.format} -> {step.target.format}"
        yield f"  {change:16} {list(step.target.shape)!s:>22}  {step.target.name}"
