"""``upgrade``: a GGUF file of the legacy layout becomes one of the split layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import Console, write_json, write_stdout
from .options import ConsoleOptions, JsonOptions
from .output_file import OutputOptions, check_new, write_files

if TYPE_CHECKING:
    from ..convert.upgrade import UpgradePlan


@dataclass(frozen=True)
class UpgradeOptions:
    """Which file, and what may change in it."""

    old: Annotated[
        Path, typer.Argument(metavar="OLD", help="File with attn_kv_b; of a split one, any part.")
    ]
    new: Annotated[Path, typer.Argument(metavar="NEW", help="GGUF file to write.")]
    k_b_type: Annotated[
        str,
        typer.Option(
            "--k-b-type",
            metavar="TYPE",
            help="What a quantized attn_k_b is encoded to: q8_0, f16, bf16, f32 (lossless).",
        ),
    ] = "q8_0"


def upgrade(
    options: UpgradeOptions, file: OutputOptions, output: JsonOptions, console: ConsoleOptions
) -> None:
    """Rewrite a file from before the layout change (attn_kv_b), without the checkpoint."""
    from ..convert.upgrade import plan_upgrade

    plan = plan_upgrade(
        options.old,
        options.new,
        k_b_format=options.k_b_type,
        max_shard_bytes=file.max_shard_bytes,
        threads=file.threads,
    )
    check_new(plan.output.paths, force=file.force)
    printer = Console(console, as_json=output.as_json)
    for text in _changes(plan):
        printer.note(text)
    write_files(printer, plan)
    if output.as_json:
        write_json(_as_json(plan))
    else:
        write_stdout("".join(f"{path}\n" for path in plan.output.paths))


def _changes(plan: UpgradePlan) -> list[str]:
    """What becomes of the joint tensors, in words."""
    texts = [f"{plan.n_split} attn_kv_b are split; attn_v_b keeps their rows, byte for byte"]
    for change in plan.requantized:
        loss = "decoded" if change.after == "F32" else "re-quantized"
        texts.append(
            f"{change.n_tensors} attn_k_b are {loss} from {change.before} to {change.after}, "
            "because blocks run along the other dimension there"
        )
    if not plan.requantized:
        texts.append("attn_k_b is transposed without a change to any number")
    return texts


def _as_json(plan: UpgradePlan) -> dict[str, object]:
    return {
        "paths": [str(path) for path in plan.output.paths],
        "n_bytes": plan.output.n_bytes,
        "split": plan.n_split,
        "requantized": [
            {"tensors": change.n_tensors, "from": change.before, "to": change.after}
            for change in plan.requantized
        ],
    }
