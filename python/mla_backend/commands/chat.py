"""``chat``: a conversation on the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ContextError, SessionError, TemplateError, TokenizerError
from .console import Console, stats_text
from .line_input import LineInput
from .loading import check_place, load_model
from .options import ConsoleOptions, ContextOptions, ModelOptions, ModelPath, SamplingOptions

if TYPE_CHECKING:
    from ..generator import Chunk
    from ..thinking import Split
    from .dialogue import Dialogue

_HELP = """\
/reset        forget the conversation
/save FILE    write the conversation, and its context to FILE.session
/load FILE    go on with a saved one
/help         these lines
/exit         leave, as Ctrl-D does
Ctrl-C stops an answer and keeps what was said. A line that ends in \\ goes on in the next one.
A message that begins with / is written //."""

# Errors that leave the conversation as it was.
_RECOVERABLE = (ContextError, SessionError, TemplateError, TokenizerError, OSError)


@dataclass(frozen=True)
class ChatOptions:
    """How the conversation begins."""

    system: Annotated[
        str | None,
        typer.Option("-sys", "--system-prompt", metavar="TEXT", help="System message."),
    ] = None
    session: Annotated[
        Path | None,
        typer.Option(
            "--session",
            metavar="FILE",
            readable=False,
            help="Go on with the conversation in FILE if it exists, and save it there afterwards.",
        ),
    ] = None
    think: Annotated[
        bool | None,
        typer.Option(
            "--think/--no-think",
            show_default=False,
            help="For templates that can ask for thinking or leave it out.",
        ),
    ] = None

    @property
    def template_options(self) -> dict[str, object]:
        """Variables for the template: publishers use two names for the same switch."""
        if self.think is None:
            return {}
        return {"thinking": self.think, "enable_thinking": self.think}


def chat(
    path: ModelPath,
    options: ChatOptions,
    context: ContextOptions,
    model_options: ModelOptions,
    sampling: SamplingOptions,
    console_options: ConsoleOptions,
) -> None:
    """Talk to a model; it remembers the conversation. Thinking is shown dim, on stderr."""
    from .dialogue import Dialogue

    arguments = sampling.arguments()
    check_place(options.session)
    console = Console(console_options)
    with load_model(path.path, context, model_options, console) as model:
        dialogue = Dialogue(model, system=options.system, template_options=options.template_options)
        loop = _Loop(dialogue, console, model.n_ctx, arguments)
        if options.session is not None and options.session.exists():
            loop.load(options.session)
        loop.run()
        if options.session is not None:
            loop.save(options.session)


class _Loop:
    """Reads lines until there are no more; each is a command or a question."""

    def __init__(
        self, dialogue: Dialogue, console: Console, n_ctx: int, arguments: dict[str, Any]
    ) -> None:
        self._dialogue = dialogue
        self._console = console
        self._n_ctx = n_ctx
        self._arguments = arguments
        self._input = LineInput()

    def run(self) -> None:
        """Leave at the end of input, or with the first error where nobody sits at a terminal."""
        if self._input.is_interactive:
            self._console.note("Ctrl-C stops an answer, Ctrl-D leaves, /help shows commands.")
        while (line := self._input.read()) is not None:
            try:
                if not self._handle(line):
                    return
            except KeyboardInterrupt:
                self._console.end_answer()
                if not self._input.is_interactive:
                    raise
                self._console.note("(stopped)")
            except _RECOVERABLE as error:
                self._console.end_answer()
                if not self._input.is_interactive:
                    raise
                self._console.error(error)

    def _handle(self, line: str) -> bool:
        """Act on one line; False ends the conversation."""
        if line.startswith("/") and not line.startswith("//"):
            return self._command(*line[1:].split(maxsplit=1))
        if line.strip():
            self._ask(line.removeprefix("/") if line.startswith("//") else line)
        return True

    def _command(self, name: str = "", argument: str = "") -> bool:
        path = Path(argument.strip()).expanduser()
        needs_file = name in ("save", "load")
        if needs_file and not argument.strip():
            self._console.note(f"/{name} needs the name of a file")
        elif name == "save":
            self.save(path)
        elif name == "load":
            self.load(path)
        elif name == "reset":
            self._dialogue.reset()
            self._console.note("(a new conversation)")
        elif name == "help":
            self._console.note(_HELP)
        elif name != "exit":
            self._console.note(f"there is no command /{name}; /help shows them")
        return name != "exit"

    def save(self, path: Path) -> None:
        """Save the conversation, and say so."""
        self._dialogue.save(path)
        self._console.note(f"(saved {len(self._dialogue.messages)} messages to {path})")

    def load(self, path: Path) -> None:
        """Load a conversation, and say what it holds."""
        reason = self._dialogue.load(path)
        self._console.note(f"(loaded {len(self._dialogue.messages)} messages from {path})")
        if reason is not None:
            self._console.note(f"note: all of it is computed again: {reason}")

    def _ask(self, text: str) -> None:
        last = self._dialogue.ask(
            text, self._show, on_progress=self._console.progress, **self._arguments
        )
        self._console.end_answer()
        if last.finish_reason == "length":
            self._console.note(self._length_text(last))
        self._console.note(f"({stats_text(last.stats)})")

    def _show(self, piece: Split) -> None:
        self._console.thought(piece.thinking)
        self._console.answer(piece.answer)

    def _length_text(self, last: Chunk) -> str:
        if last.stats.n_prompt + last.stats.n_generated >= self._n_ctx:
            return f"(the context of {self._n_ctx} positions is full; /reset begins anew)"
        return f"(the limit of {last.stats.n_generated} tokens is reached)"
