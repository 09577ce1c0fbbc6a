"""Typed access to a JSON object that gathers problems instead of raising them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, TypeVar

_MAX_EXTENT: Final = (1 << 31) - 1
_T = TypeVar("_T")


class Fields:
    """One object of a JSON file; null counts as missing.

    Args:
        values: the object.
        problems: texts are added here.
        where: leads the texts.
    """

    def __init__(
        self, values: Mapping[str, Any], problems: list[str], where: str = "config.json"
    ) -> None:
        self._values = values
        self._problems = problems
        self._where = where

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it is, ``default`` where it is missing or null."""
        value = self._values.get(name)
        return default if value is None else value

    def integer(
        self, name: str, default: int | None = None, low: int = 1, high: int = _MAX_EXTENT
    ) -> int:
        """An integer from ``low`` to ``high``; required without ``default``."""
        value = self.get(name, default)
        if type(value) is int and low <= value <= high:
            return value
        return self._wrong(name, value, f"an integer from {low} to {high}", low)

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number; required without ``default``."""
        value = self.get(name, default)
        if type(value) in (int, float) and 0 < value < math.inf:
            return float(value)
        return self._wrong(name, value, "a positive number", 1.0)

    def optional_number(self, name: str) -> float | None:
        """A number of at least 0, or None where it is missing."""
        value = self.get(name)
        if value is None or (type(value) in (int, float) and 0 <= value < math.inf):
            return None if value is None else float(value)
        return self._wrong(name, value, "a number of at least 0", 0.0)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self.get(name, default)
        return value if type(value) is bool else self._wrong(name, value, "true, false", default)

    def text(self, name: str, default: str) -> str:
        """A string."""
        value = self.get(name, default)
        return value if isinstance(value, str) else self._wrong(name, value, "a string", default)

    def choice(self, name: str, accepted: tuple[str, ...], default: str) -> str:
        """One of some strings."""
        value = self.get(name, default)
        if value in accepted:
            return str(value)
        return self._wrong(name, value, ", ".join(accepted), accepted[0])

    def expect(self, name: str, accepted: tuple[object, ...], default: object) -> None:
        """Report a value other than the accepted ones."""
        value = self.get(name, default)
        if value not in accepted:
            self._wrong(name, value, ", ".join(map(str, accepted)), None)

    def child(self, name: str) -> Fields | None:
        """An object within this one, None where it is missing or empty."""
        value = self.get(name)
        if value is None or value == {}:
            return None
        if isinstance(value, Mapping):
            return Fields(value, self._problems, f"{self._where}: {name}")
        return self._wrong(name, value, "an object", None)

    def require(self, condition: bool, problem: str) -> None:
        """Report ``problem`` unless ``condition`` holds."""
        if not condition:
            self._problems.append(f"{self._where}: {problem}")

    def _wrong(self, name: str, value: object, accepted: str, fallback: _T) -> _T:
        found = "nothing" if value is None else repr(value)[:60]
        self._problems.append(f"{self._where}: {name}: found {found}; accepted: {accepted}")
        return fallback
