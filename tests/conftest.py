"""Fixtures for all tests, and the choice of those that run on a CUDA device."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from cuda.device import is_emulated, load_emulated

# Shells start background jobs with Ctrl-C ignored, and processes inherit that. Tests of interrupts
# would then wait for ever in their children.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What tests find out about this machine is not kept in the user's home.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="mla-cache-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

_CUDA_TESTS = Path(__file__).parent / "cuda"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cuda",
        choices=["all", "only", "short"],
        default="all",
        help="all tests; only those on a CUDA device; or of these, the fewest in which every value "
        "of every parameter comes up",
    )


def pytest_configure() -> None:
    load_emulated()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    choice = config.getoption("--cuda")
    if choice == "all":
        return
    kept = [item for item in items if _is_on_cuda(item)]
    if choice == "short":
        kept = list(_each_value_once(kept))
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    large = item.get_closest_marker("large")
    if large is not None and _is_on_cuda(item) and is_emulated():
        pytest.skip("too much work for an emulated device")


def _parameters(item: pytest.Item) -> dict[str, Any]:
    callspec = getattr(item, "callspec", None)
    return dict(callspec.params) if callspec is not None else {}


def _is_on_cuda(item: pytest.Item) -> bool:
    """Tests of the device itself, and those that some parameter sends there."""
    values = (value for value in _parameters(item).values() if isinstance(value, str))
    return _CUDA_TESTS in item.path.parents or any(v.split(":")[0] == "cuda" for v in values)


def _each_value_once(items: Iterable[pytest.Item]) -> Iterable[pytest.Item]:
    seen: set[tuple[str, str, str]] = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        values = {(test, name, repr(value)) for name, value in _parameters(item).items()}
        if not values or not values <= seen:
            seen |= values
            yield item


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
