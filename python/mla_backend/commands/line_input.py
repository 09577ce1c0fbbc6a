"""Lines that a person types, or that come through a pipe."""

from __future__ import annotations

import sys
from contextlib import suppress

from ..errors import UsageError

_PROMPT, _CONTINUED = "> ", "| "


class LineInput:
    """Reads messages from stdin; on a terminal with line editing and history.

    Attributes:
        is_interactive: whether stdin is a terminal.
    """

    def __init__(self) -> None:
        self.is_interactive = sys.stdin.isatty()
        if self.is_interactive:
            with suppress(ImportError):  # some Pythons come without it: plain lines
                import readline  # noqa: F401  # its import gives input() editing and history

    def read(self) -> str | None:
        """The next message, or None at the end of input.

        Lines that end in a backslash are joined with what follows. On a terminal, Ctrl-C discards
        what was typed.

        Raises:
            UsageError: a line is not valid UTF-8.
        """
        parts: list[str] = []
        while True:
            try:
                line = self._line(_CONTINUED if parts else _PROMPT)
            except KeyboardInterrupt:
                if not self.is_interactive:
                    raise
                sys.stderr.write("\n")
                parts.clear()
                continue
            if line is None:
                return "\n".join(parts) if parts else None
            if not line.endswith("\\"):
                return "\n".join([*parts, line])
            parts.append(line[:-1])

    def _line(self, prompt: str) -> str | None:
        if not self.is_interactive:
            data = sys.stdin.buffer.readline()
            return _decode(data).removesuffix("\n") if data else None
        if not sys.stdout.isatty():  # input() would write its prompt into the answers
            sys.stderr.write(prompt)
            sys.stderr.flush()
            prompt = ""
        try:
            return _decode(input(prompt).encode("utf-8", "surrogateescape"))
        except EOFError:
            sys.stderr.write("\n")
            return None


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"stdin: byte {error.start} of a line (0x{data[error.start]:02x}) is not valid UTF-8"
        ) from None
