"""Stop strings in streamed text."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Passes text through up to the first stop string, holding back what may be the start of one.

    Attributes:
        found: the stop string that ended the text, or None.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Add text; returns what is certain to come before any stop string."""
        if self.found is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        hits = [(self._held.find(stop), stop) for stop in self._stops if stop in self._held]
        if hits:
            at, self.found = min(hits)
            certain, self._held = self._held[:at], ""
            return certain
        keep = self._longest_start()
        cut = len(self._held) - keep
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain

    def flush(self) -> str:
        """The text held back, when no more is coming."""
        rest, self._held = self._held, ""
        return rest

    def _longest_start(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-n:]) for stop in self._stops):
                return n
        return 0
