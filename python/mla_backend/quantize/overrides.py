"""Formats chosen by name: ``ffn_down_exps=q3_k``, the building blocks of mixes of one's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import FormatError, UsageError
from ..formats import by_name


@dataclass(frozen=True)
class Override:
    """Matrices whose names the pattern is found in get this format."""

    pattern: re.Pattern[str]
    format: str


def parse_override(text: str) -> Override:
    """``PATTERN=TYPE``: a regular expression, sought anywhere in a name, and a format.

    Raises UsageError where either means nothing.
    """
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(f"tensor type {text!r}: accepted is PATTERN=TYPE, as ffn_down_exps=q3_k")
    try:
        format = by_name(name)
    except FormatError as error:
        raise UsageError(f"tensor type {text!r}: {error}") from error
    if format.name == "I32":
        raise UsageError(f"tensor type {text!r}: I32 is no format of weights")
    try:
        return Override(re.compile(pattern), format.name)
    except re.error as error:
        raise UsageError(f"tensor type {text!r}: the pattern is invalid: {error}") from error


def overriding(overrides: Sequence[Override], name: str) -> str | None:
    """The format that the first pattern found in ``name`` gives, or None."""
    return next((entry.format for entry in overrides if entry.pattern.search(name)), None)
