"""Commands that read a text in chunks: which text, which model, how long the chunks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from .options import ContextOptions

if TYPE_CHECKING:
    from ..chunks import Chunks
    from ..model import Model


@dataclass(frozen=True)
class TextOptions:
    """What is read by what."""

    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="GGUF file; of a split one, any part.")
    ]
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="Text file, in UTF-8.")]


@dataclass(frozen=True)
class ChunkOptions(ContextOptions):
    """How the text is cut; the context is as long as a chunk."""

    ctx_size: Annotated[
        int, typer.Option("-c", "--ctx-size", min=4, metavar="N", help="Tokens of a chunk.")
    ] = 512
    chunks: Annotated[
        int | None,
        typer.Option(
            "--chunks", min=1, metavar="N", show_default=False, help="Read only so many chunks."
        ),
    ] = None


def read_text(path: Path) -> str:
    """A text as it is in its file. Raises UsageError where it is not UTF-8, OSError."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: byte {error.start} (0x{data[error.start]:02x}) is not valid UTF-8"
        ) from None


def chunks_of(model: Model, text: str, options: ChunkOptions) -> Chunks:
    """The chunks that the options name."""
    from ..chunks import split_text

    return split_text(model.tokenizer, text, options.ctx_size, options.chunks)
