"""What goes where: the answer to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from .options import ConsoleOptions
from .progress import ProgressReporter
from .units import rate_text

if TYPE_CHECKING:
    from ..generator import Stats

_DIM, _NORMAL = "\x1b[2m", "\x1b[0m"
# A terminal obeys control characters, and an answer may hold any: only these two are harmless.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Console:
    """One command's output.

    Attributes:
        progress: to be passed as ``on_progress``.
    """

    def __init__(self, options: ConsoleOptions, *, as_json: bool = False) -> None:
        self._quiet = options.quiet
        self._verbose = options.verbose and not options.quiet
        self._as_json = as_json
        self._open_line = False  # the answer so far does not end a line
        self.progress = ProgressReporter(enabled=not options.quiet)

    def answer(self, text: str) -> None:
        """Write a piece of the answer at once, unless all of it goes into JSON."""
        if not text or self._as_json:
            return
        self.progress.clear()
        if sys.stdout.isatty():
            text = text.translate(_CONTROLS)
        write_stdout(text)
        self._open_line = not text.endswith("\n")

    def thought(self, text: str) -> None:
        """Write a piece of thinking: dim, and apart from the answer."""
        if not text or self._quiet:
            return
        self.progress.clear()
        if sys.stderr.isatty():
            text = f"{_DIM}{text.translate(_CONTROLS)}{_NORMAL}"
        sys.stderr.write(text)
        sys.stderr.flush()

    def end_answer(self) -> None:
        """Begin a new line on a terminal; files get the answer as it is."""
        self.progress.clear()
        if self._open_line and sys.stdout.isatty():
            write_stdout("\n")
        self._open_line = False

    def note(self, text: str) -> None:
        """A line on stderr."""
        if not self._quiet:
            self._line(text)

    @property
    def is_verbose(self) -> bool:
        """Whether ``detail`` shows anything."""
        return self._verbose

    def detail(self, text: str) -> None:
        """A line on stderr that only ``--verbose`` shows."""
        if self._verbose:
            self._line(text)

    def error(self, error: Exception) -> None:
        """An error after which the command goes on."""
        self._line(f"error: {error}")

    def notes(self, texts: Iterable[str]) -> None:
        """What the model has to say about itself."""
        for text in texts:
            self.note(f"note: {text}")

    def _line(self, text: str) -> None:
        self.progress.clear()
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def write_stdout(text: str) -> None:
    """Write UTF-8 whatever the locale says, and flush."""
    sys.stdout.flush()  # what others wrote comes first
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))
    sys.stdout.buffer.flush()


def write_json(value: Mapping[str, object]) -> None:
    """Write one JSON object on a line of its own."""
    write_stdout(json.dumps(value, ensure_ascii=False) + "\n")


def stats_text(stats: Stats) -> str:
    """``prompt: 48 tokens, 310 tokens/s; answer: 32 tokens, 20.1 tokens/s``."""
    new = stats.n_prompt - stats.n_reused
    prompt = f"prompt: {stats.n_prompt} tokens"
    if stats.n_reused:
        prompt += f" ({stats.n_reused} reused)"
    if new > 0 and stats.prompt_seconds > 0:
        prompt += f", {rate_text(stats.prompt_tps, 'tokens')}"
    answer = f"answer: {stats.n_generated} tokens"
    if stats.n_generated > 1 and stats.generation_seconds > 0:
        answer += f", {rate_text(stats.generation_tps, 'tokens')}"
    return f"{prompt}; {answer}"
