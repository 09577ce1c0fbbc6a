"""Tests that need several memory nodes, or a guest that has them: ``make numa``."""

from __future__ import annotations

import os

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("numa") is not None and os.environ.get("NUMA_LAB") != "1":
        pytest.skip("NUMA_LAB is not 1: it says that this machine has memory nodes (make numa)")
