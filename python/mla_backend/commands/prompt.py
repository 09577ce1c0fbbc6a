"""Where a prompt comes from."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import UsageError


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt given as text, as a file, or (``-``) on stdin.

    One line feed at the end of a file is dropped: editors and ``echo`` put it there.

    Raises:
        UsageError: none or two are given, it is empty, or it is not valid UTF-8.
        OSError: the file cannot be read.
    """
    if prompt is not None and file is not None:
        raise UsageError("both -p and -f give a prompt; accepted: one of them")
    if prompt is None and file is None:
        raise UsageError("no prompt; expected -p TEXT, -p - for stdin, or -f FILE")
    if prompt == "-" or (file is not None and str(file) == "-"):
        text, source = _decode(sys.stdin.buffer.read(), "stdin"), "stdin"
    elif file is not None:
        text, source = _decode(file.read_bytes(), str(file)), str(file)
    else:
        text, source = _check(prompt or ""), "-p"
    if not text:
        raise UsageError(f"the prompt is empty ({source}); expected at least one character")
    return text


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{source}: byte {error.start} (0x{data[error.start]:02x}) is not valid UTF-8; "
            "a prompt is UTF-8 text"
        ) from None


def _check(text: str) -> str:
    """Arguments that are no UTF-8 reach Python as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"-p: character {error.start} is not valid UTF-8; a prompt is UTF-8 text"
        ) from None
    return text
