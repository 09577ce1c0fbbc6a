"""Running the command line, in this process and in others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from mla_backend.cli import main
from small_models import small_model


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command line here."""

    def run(*arguments: object) -> Result:
        status = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Result(status, captured.out, captured.err)

    return run


@pytest.fixture
def process() -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Runs a command line in a process of its own."""

    def run(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "mla_backend", *(str(item) for item in arguments)]
        return subprocess.run(command, input=stdin, capture_output=True, timeout=120, check=False)

    return run


@pytest.fixture(scope="session")
def tiny() -> Path:
    return small_model("tiny-v3", "q8_0")


@pytest.fixture(scope="session")
def tiny_legacy() -> Path:
    return small_model("tiny-v2", "q4_k_m", "legacy")
