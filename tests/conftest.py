"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


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
