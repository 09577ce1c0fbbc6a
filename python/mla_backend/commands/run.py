"""``run``: continue one prompt."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..bundled import bundled_model
from .console import Console, stats_text, write_json
from .demo import ABOUT
from .loading import check_place, load_model, model_facts
from .options import (
    ConsoleOptions,
    ContextOptions,
    JsonOptions,
    ModelOptions,
    ModelPath,
    SamplingOptions,
)
from .prompt import read_prompt

if TYPE_CHECKING:
    from ..generator import Chunk
    from ..model import Model


@dataclass(frozen=True)
class RunOptions:
    """The prompt, and what is wanted beside its continuation."""

    prompt: Annotated[
        str | None,
        typer.Option("-p", "--prompt", metavar="TEXT", help="The prompt; - reads stdin."),
    ] = None
    file: Annotated[
        Path | None,
        typer.Option(
            "-f", "--file", metavar="FILE", readable=False, help="Read the prompt from a file."
        ),
    ] = None
    no_bos: Annotated[bool, typer.Option("--no-bos", help="Do not begin with the BOS token.")] = (
        False
    )
    session: Annotated[
        Path | None,
        typer.Option(
            "--session",
            metavar="FILE",
            readable=False,
            help="Keep what was computed: read FILE if it exists, and write it afterwards, "
            "after Ctrl-C too. A prompt that begins alike goes on from there.",
        ),
    ] = None
    logprobs: Annotated[
        int | None,
        typer.Option(
            "--logprobs",
            min=0,
            metavar="N",
            show_default=False,
            help="Report each token's log-probability, and those of the N likeliest.",
        ),
    ] = None


def run(
    path: ModelPath,
    options: RunOptions,
    context: ContextOptions,
    model_options: ModelOptions,
    sampling: SamplingOptions,
    output: JsonOptions,
    console_options: ConsoleOptions,
) -> None:
    """Continue a prompt (the bundled model if none is named). Only the answer goes to stdout."""
    file = path.path if path.is_named else bundled_model()
    prompt = read_prompt(options.prompt, options.file)
    arguments = sampling.arguments()
    check_place(options.session)
    console = Console(console_options, as_json=output.as_json)
    if not path.is_named:
        console.note(f"no model is named: this is {ABOUT}")
    with load_model(file, context, model_options, console) as model:
        _load_session(model, options.session, console)
        ids = model.tokenizer.encode(prompt, add_bos=False if options.no_bos else None)
        stream = model.stream(
            ids,
            logprobs=options.logprobs or 0,
            on_progress=console.progress,
            **arguments,
        )
        chunks: list[Chunk] = []
        try:
            with closing(stream):
                for chunk in stream:
                    chunks.append(chunk)
                    console.answer(chunk.text)
        except KeyboardInterrupt:
            console.end_answer()
            _save_session(model, options.session, console)  # the next run goes on from here
            raise
        finally:
            console.end_answer()
        _save_session(model, options.session, console)
        if output.as_json:
            facts = model_facts(model, context, model_options)
            write_json(_result(model, chunks, options.logprobs) | {"model": facts})
            return
        if options.logprobs is not None:
            _print_logprobs(model, chunks, console)
        console.note(f"{stats_text(chunks[-1].stats)} ({chunks[-1].finish_reason})")


def _load_session(model: Model, path: Path | None, console: Console) -> None:
    if path is not None and path.exists():
        model.load_session(path)
        console.detail(f"session: read {path}")


def _save_session(model: Model, path: Path | None, console: Console) -> None:
    if path is not None:
        model.save_session(path)
        console.detail(f"session: wrote {path}")


def _result(model: Model, chunks: list[Chunk], logprobs: int | None) -> dict[str, object]:
    """What ``--json`` prints, apart from the model's facts."""
    stats = chunks[-1].stats
    found: dict[str, object] = {
        "text": "".join(chunk.text for chunk in chunks),
        "tokens": [chunk.token for chunk in chunks if chunk.token is not None],
        "finish_reason": chunks[-1].finish_reason,
        "stats": asdict(stats)
        | {"prompt_tps": stats.prompt_tps, "generation_tps": stats.generation_tps},
        "memory": asdict(model.memory),
        "notes": list(model.notes),
    }
    if logprobs is not None:
        found["logprobs"] = [
            {
                "token": chunk.token,
                "text": model.tokenizer.decode([chunk.token]),
                "logprob": chunk.logprob,
                "top": [{"token": token, "logprob": value} for token, value in chunk.top_logprobs],
            }
            for chunk in chunks
            if chunk.token is not None
        ]
    return found


def _print_logprobs(model: Model, chunks: list[Chunk], console: Console) -> None:
    def shown(token: int) -> str:
        return repr(model.tokenizer.decode([token]))

    for chunk in chunks:
        if chunk.token is not None and chunk.logprob is not None:
            others = "".join(f"  {shown(token)} {value:.3f}" for token, value in chunk.top_logprobs)
            console.note(f"{chunk.logprob:8.3f}  {shown(chunk.token)}{others and '   of' + others}")
