"""Fixtures for all tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Shells start background jobs with Ctrl-C ignored, and processes inherit that. Tests of interrupts
# would then wait for ever in their children.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """Directory of the reference models, which the environment variable MLA_FIXTURES names."""
    name = os.environ.get("MLA_FIXTURES")
    if not name:
        pytest.skip("MLA_FIXTURES is not set: it names the directory of the reference models")
    directory = Path(name)
    if not (directory / "text.txt").is_file():
        pytest.fail(f"MLA_FIXTURES names {directory}, which has no text.txt")
    return directory
