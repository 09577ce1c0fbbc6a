"""What every operation is tested on: backends, instruction sets, thread counts."""

from __future__ import annotations

import pytest
from mla_backend import _core
from mla_backend.ops import Where


@pytest.fixture(params=["cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=_core.compiled_isas())
def isa(request: pytest.FixtureRequest) -> str:
    """Every instruction set of this build; those that the CPU lacks are reported as skipped."""
    name = str(request.param)
    if name not in _core.available_isas():
        pytest.skip(f"this CPU lacks {name}")
    return name


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def where(backend: str, isa: str) -> Where:
    """Keywords of an eager operation, on two threads."""
    return {"backend": backend, "isa": isa, "threads": 2}
