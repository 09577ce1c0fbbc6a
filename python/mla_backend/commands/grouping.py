"""Commands whose options are declared once, as the fields of frozen dataclasses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

Command = Callable[..., None]


def grouped(function: Command) -> Command:
    """A command that typer understands from a function whose parameters are groups of options.

    Every parameter of ``function`` is annotated with a dataclass whose fields are annotated as
    typer wants it. Options appear in the order of the groups and their fields.
    """
    groups = {name: hint for name, hint in get_type_hints(function).items() if name != "return"}
    parameters: list[inspect.Parameter] = []
    for group in groups.values():
        hints = get_type_hints(group, include_extras=True)
        parameters += (
            inspect.Parameter(
                item.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if item.default is MISSING else item.default,
                annotation=hints[item.name],
            )
            for item in fields(group)
        )

    def command(**values: Any) -> None:
        made = {
            name: group(**{item.name: values[item.name] for item in fields(group)})
            for name, group in groups.items()
        }
        function(**made)

    command.__name__ = function.__name__
    command.__doc__ = function.__doc__
    command.__annotations__ = {item.name: item.annotation for item in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command
