"""Progress of long phases on stderr: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from .units import bytes_text, duration_text, rate_text

if TYPE_CHECKING:
    from rich.progress import Progress

#: Unit of each phase's amounts.
_UNITS = {
    "load": "bytes",
    "write": "bytes",
    "prefill": "tokens",
    "text": "tokens",
    "bench": "runs",
    "tune": "trials",
}
_TITLES = {
    "load": "loading",
    "write": "writing",
    "prefill": "reading the prompt",
    "text": "reading the text",
    "bench": "measuring",
    "tune": "trying settings",
}
# Groups of memory nodes load side by side: "load node 0" is reported before the whole.
_PART_OF_LOAD = "load "
# Phases shorter than this show nothing.
_BAR_DELAY_S = 0.3
_LINE_DELAY_S = 2.0
_LINE_INTERVAL_S = 5.0


class _Display(Protocol):
    def show(self, text: str, done: int, total: int, seconds: float) -> None: ...

    def clear(self) -> None: ...


class ProgressReporter:
    """An ``on_progress(phase, done, total)`` that shows rate and remaining time."""

    def __init__(self, enabled: bool = True) -> None:
        self._display: _Display | None = None
        if enabled:
            self._display = _Bar() if sys.stderr.isatty() else _Lines()
        self._phase: tuple[str, int] | None = None
        self._started_s = 0.0
        self._first_done = 0
        self._last_done = 0
        self._parts: dict[str, float] = {}  # rates of groups of nodes, by their names

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Report ``done`` of ``total`` units of a phase; another phase or total begins anew."""
        if self._display is None:
            return
        now = time.monotonic()
        if phase.startswith(_PART_OF_LOAD):
            seconds = now - self._started_s if self._phase else 0.0
            self._parts[phase.removeprefix(_PART_OF_LOAD)] = done / seconds if seconds else 0.0
            return
        if self._phase != (phase, total) or done < self._last_done:
            self._display.clear()
            self._phase, self._started_s, self._first_done = (phase, total), now, done
        self._last_done = done
        seconds = now - self._started_s
        rate = (done - self._first_done) / seconds if seconds > 0 else 0.0
        if done >= total:
            self.clear()
        else:
            text = describe(phase, done, total, rate, self._parts if phase == "load" else {})
            self._display.show(text, done, total, seconds)

    def clear(self) -> None:
        """Take what is shown away; the next call begins a phase."""
        if self._display is not None:
            self._display.clear()
        self._phase = None
        self._parts.clear()


def describe(
    phase: str, done: int, total: int, rate: float, parts: Mapping[str, float] | None = None
) -> str:
    """``reading the prompt: 512 of 4096 tokens (12 %), 95.3 tokens/s, 38 s left``.

    ``parts``: rates of parts that run side by side, by their names.
    """
    unit = _UNITS.get(phase, "steps")
    if unit == "bytes":
        amounts = f"{bytes_text(done)} of {bytes_text(total)}"
    else:
        amounts = f"{done} of {total} {unit}"
    text = f"{_TITLES.get(phase, phase)}: {amounts} ({100 * done // max(total, 1)} %)"
    if rate > 0:
        left = duration_text((total - done) / rate)
        text += f", {rate_text(rate, unit)}, {left} left"
    shown = [f"{name} {rate_text(rate, unit)}" for name, rate in (parts or {}).items() if rate > 0]
    return text + (f" ({', '.join(shown)})" if shown else "")


class _Lines:
    """Where stderr is a file: silence for short phases, then a line every few seconds."""

    def __init__(self) -> None:
        self._next_s = _LINE_DELAY_S

    def show(self, text: str, done: int, total: int, seconds: float) -> None:
        if seconds >= self._next_s:
            self._next_s = seconds + _LINE_INTERVAL_S
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def clear(self) -> None:
        self._next_s = _LINE_DELAY_S


class _Bar:
    """A bar that appears after a moment and vanishes when the phase ends.

    A timer starts it, because the first report of a long prompt may be the only one for a while.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._bar: Progress | None = None
        self._state = ("", 0, 0)  # description, done, total

    def show(self, text: str, done: int, total: int, seconds: float) -> None:
        with self._lock:
            self._state = (text, done, total)
            if self._bar is not None:
                self._update(self._bar)
            elif self._timer is None:
                self._timer = threading.Timer(_BAR_DELAY_S, self._start)
                self._timer.daemon = True
                self._timer.start()

    def clear(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            if self._bar is not None:
                self._bar.stop()
            self._timer = self._bar = None

    def _start(self) -> None:
        bar = _make_bar()
        bar.add_task("", total=None)
        with self._lock:
            if self._timer is threading.current_thread():  # else it was cleared meanwhile
                self._bar = bar
                bar.start()
                self._update(bar)

    def _update(self, bar: Progress) -> None:
        text, done, total = self._state
        bar.update(bar.task_ids[0], description=text, completed=done, total=total)


def _make_bar() -> Progress:
    # Here, not above: it takes a tenth of a second, and short runs never need it.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
