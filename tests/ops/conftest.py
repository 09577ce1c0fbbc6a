"""What every operation is tested on: backends, instruction sets, thread counts.

A CUDA case during which nodes fell to the CPU passes as nothing: it is reported as skipped, with
what the device refused.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
from cuda.device import cuda_problem, refusals
from mla_backend import _core, eager
from mla_backend.ops import Where


@pytest.fixture(params=_core.compiled_isas())
def isa(request: pytest.FixtureRequest) -> str:
    """Every instruction set of this build; those that the CPU lacks are reported as skipped."""
    return _available(str(request.param))


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=[*(f"cpu-{isa}" for isa in _core.compiled_isas()), "cuda"])
def where(request: pytest.FixtureRequest) -> Where:
    """Keywords of an eager operation: each instruction set on two threads, and a CUDA device."""
    backend, _, isa = str(request.param).partition("-")
    if backend == "cpu":
        return {"backend": backend, "isa": _available(isa), "threads": 2}
    if problem := cuda_problem():
        pytest.skip(problem)
    return {"backend": backend, "isa": None, "threads": 2}


def _available(isa: str) -> str:
    if isa not in _core.available_isas():
        pytest.skip(f"this CPU lacks {isa}")
    return isa


@pytest.fixture(autouse=True)
def _refusals_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    run = eager.Call.run

    def run_and_note(call: eager.Call, *nodes: _core.Node) -> tuple[Any, ...]:
        values = run(call, *nodes)
        refusals.extend(call.refusals)
        return values

    monkeypatch.setattr(eager.Call, "run", run_and_note)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    refusals.clear()
    result = yield
    if refusals:
        pytest.skip(f"{len(refusals)} nodes ran on the CPU: {refusals[0]}")
    return result
