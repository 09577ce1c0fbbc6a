"""Numbers for people, progress, and control characters."""

from __future__ import annotations

import re
import sys
import time
from io import StringIO

import pytest
from mla_backend.commands import progress
from mla_backend.commands.console import Console
from mla_backend.commands.options import ConsoleOptions
from mla_backend.commands.progress import ProgressReporter, describe
from mla_backend.commands.units import bytes_text, count_text, duration_text, rate_text


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (10 * 2**30, "10.0 GiB"),
        (399 * 2**30, "399 GiB"),
        (2**60, "1024 PiB"),
    ],
)
def test_bytes(n_bytes: int, text: str) -> None:
    assert bytes_text(n_bytes) == text


def test_other_numbers() -> None:
    assert count_text(671e9) == "671 billion"
    assert count_text(15.7e9) == "15.7 billion"
    assert count_text(12) == "12"
    assert [duration_text(s) for s in (0.2, 59.4, 200, 7500)] == [
        "0 s",
        "59 s",
        "3 min 20 s",
        "2 h 5 min",
    ]
    assert rate_text(0.5, "tokens") == "0.50 tokens/s"
    assert rate_text(2**20, "bytes") == "1.0 MiB/s"


def test_describe() -> None:
    text = describe("prefill", 512, 4096, 100.0)
    assert text == "reading the prompt: 512 of 4096 tokens (12 %), 100 tokens/s, 36 s left"
    assert describe("load", 0, 2**30, 0.0) == "loading: 0 bytes of 1.0 GiB (0 %)"
    parts = {"node 0": 2.0**31, "node 1": 2.0**30}
    text = describe("load", 2**30, 2**32, 3 * 2.0**30, parts)
    assert text.endswith("3.0 GiB/s, 1 s left (node 0 2.0 GiB/s, node 1 1.0 GiB/s)")


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def clock(monkeypatch: pytest.MonkeyPatch, *times_s: float) -> None:
    ticks = iter(times_s)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(ticks))


def test_lines_come_late_and_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", StringIO())
    clock(monkeypatch, 0, 1, 3, 4, 9, 10)
    report = ProgressReporter()
    for done in (0, 10, 30, 40, 90, 100):
        report("prefill", done, 100)
    lines = sys.stderr.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [re.findall(r"(\d+) of", line) for line in lines] == [["30"], ["90"]]
    assert "10.0 tokens/s, 7 s left" in lines[0]


def test_rate_begins_with_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", StringIO())
    clock(monkeypatch, 0, 100, 103)
    report = ProgressReporter()
    report("prefill", 0, 9)
    report("prefill", 20, 100)  # another prompt, of which 20 tokens are there already
    report("prefill", 50, 100)
    assert "10.0 tokens/s" in sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_quiet_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", StringIO())
    clock(monkeypatch, 0, 100)
    report = ProgressReporter(enabled=False)
    report("load", 0, 10)
    report("load", 5, 10)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_bar_appears_on_terminals_and_vanishes(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_BAR_DELAY_S", 0.01)
    monkeypatch.setenv("TERM", "xterm")
    report = ProgressReporter()
    report("load", 0, 1000)
    deadline = time.monotonic() + 10
    while "loading" not in terminal.getvalue() and time.monotonic() < deadline:
        time.sleep(0.01)
    report("load", 500, 1000)
    report("load", 1000, 1000)
    assert "loading" in terminal.getvalue()
    shown = len(terminal.getvalue())
    time.sleep(0.2)
    assert len(terminal.getvalue()) == shown


def test_short_phases_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    report = ProgressReporter()
    report("load", 0, 10)
    report("load", 10, 10)
    time.sleep(0.4)
    assert terminal.getvalue() == ""


def test_terminals_get_no_control_characters(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    console = Console(ConsoleOptions())
    console.answer("a\x1b[2Jb\x07\n")
    assert capfd.readouterr().out == "a\x1b[2Jb\x07\n"  # files get what the model said
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    console.answer("a\x1b[2Jb\x07\tc")
    console.end_answer()
    assert capfd.readouterr().out == "a[2Jb\tc\n"
