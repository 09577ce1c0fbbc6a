"""``perplexity``: how well a model guesses a text, and how far it is from another model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from .console import Console, write_json, write_stdout
from .loading import check_place, load_model
from .options import ConsoleOptions, JsonOptions, ModelOptions
from .texts import ChunkOptions, TextOptions, chunks_of, read_text

if TYPE_CHECKING:
    from ..chunks import Chunks
    from ..model import Model
    from ..perplexity import Comparison, Estimate, Perplexity, Reference


@dataclass(frozen=True)
class PerplexityOptions(TextOptions):
    """What is computed beside the perplexity."""

    kl_divergence: Annotated[
        Path | None,
        typer.Option(
            "--kl-divergence",
            metavar="REF",
            show_default=False,
            help="Compare with REF: a model, or what --save-logits wrote.",
        ),
    ] = None
    save_logits: Annotated[
        Path | None,
        typer.Option(
            "--save-logits",
            metavar="FILE",
            show_default=False,
            help="Keep the log-probabilities, to compare other models with.",
        ),
    ] = None


def perplexity(
    options: PerplexityOptions,
    chunking: ChunkOptions,
    model_options: ModelOptions,
    output: JsonOptions,
    console_options: ConsoleOptions,
) -> None:
    """Measure how well a model guesses the second half of each chunk of a text."""
    from ..perplexity import compare, measure

    if options.kl_divergence is not None and options.save_logits is not None:
        raise UsageError("--save-logits is for the reference itself, without --kl-divergence")
    _check_target(options.save_logits)
    text = read_text(options.text)
    console = Console(console_options, as_json=output.as_json)
    with ExitStack() as stack:
        model = stack.enter_context(load_model(options.model, chunking, model_options, console))
        chunks = chunks_of(model, text, chunking)
        result: Perplexity | Comparison
        if options.kl_divergence is None:
            result = measure(
                model, chunks, save_logits=options.save_logits, on_progress=console.progress
            )
        else:
            path = options.kl_divergence
            base = _reference(path, model, chunks, chunking, model_options, console, stack)
            result = compare(model, base, chunks, on_progress=console.progress)
    console.progress.clear()
    if output.as_json:
        write_json({"chunks": len(chunks), "chunk_size": chunks.n_ctx} | asdict(result))
    else:
        write_stdout("".join(f"{line}\n" for line in _lines(result, chunks)))


def _check_target(path: Path | None) -> None:
    """Logits replace logits, but no model and no text."""
    from ..logits_file import is_logits_file

    check_place(path)
    if path is not None and path.exists() and not (path.is_file() and is_logits_file(path)):
        raise UsageError(f"{path} exists and holds no log-probabilities; accepted: a new name")


def _reference(
    path: Path,
    model: Model,
    chunks: Chunks,
    chunking: ChunkOptions,
    model_options: ModelOptions,
    console: Console,
    stack: ExitStack,
) -> Reference:
    """The file's logits, or those of a second model, which the stack closes."""
    from ..logits_file import LogitsFile, is_logits_file
    from ..perplexity import ModelLogits, SavedLogits, check_vocabulary

    if path.is_file() and is_logits_file(path):
        return SavedLogits(LogitsFile(path), chunks, model.config.n_vocab)
    base = stack.enter_context(load_model(path, chunking, model_options, console))
    check_vocabulary(model, base)
    return stack.enter_context(ModelLogits(base, chunks))


def _lines(result: Perplexity | Comparison, chunks: Chunks) -> Iterator[str]:
    from ..perplexity import Perplexity

    yield (
        f"{len(chunks)} chunks of {chunks.n_ctx} tokens, {result.n_tokens} of them guessed after "
        f"half a chunk"
    )
    yield f"perplexity          {_with_error(result.perplexity)}"
    if isinstance(result, Perplexity):
        return
    yield f"  of the reference  {_with_error(result.base_perplexity)}"
    yield f"  ln of the ratio   {_with_error(result.log_ratio, 6)}"
    yield f"KL divergence       {_with_error(result.kl, 6)}"
    yield f"  largest           {result.kl_max:.6f}"
    for percent, value in result.kl_percentiles.items():
        name = "median" if percent == 50 else f"{percent:g} %"
        yield f"  {name:<18}{value:.6f}"
    yield f"same likeliest      {_with_error(result.same_top)}"


def _with_error(estimate: Estimate, digits: int = 4) -> str:
    return f"{estimate.value:.{digits}f} +/- {estimate.error:.{digits}f}"
