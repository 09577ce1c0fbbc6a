"""A CUDA device for tests: the emulated one that the environment names, else the machine's.

The environment variable MLA_CUDA_EMULATED names the emulated module, which a build with
``-DMLA_CUDA_EMULATE=ON`` makes. It is loaded in the place of the installed one: a process can have
only one of them, because both define the same backend.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import lru_cache
from typing import Any

import pytest
from mla_backend import devices

NAME = "mla_backend._cuda"
EMULATED = "mla_backend._cuda_emulated"

#: Why nodes of the test that runs did not run on the device. Tests of operations clear it before
#: each test and report one that ends with any as skipped.
refusals: list[str] = []


def load_emulated() -> None:
    """Loads the emulated module where the environment names one, before anyone needs a device."""
    path = os.environ.get("MLA_CUDA_EMULATED")
    if not path:
        return
    spec = importlib.util.spec_from_file_location(EMULATED, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = sys.modules[EMULATED] = module


@lru_cache(maxsize=1)
def cuda_problem() -> str:
    """Why no CUDA device can be tested here; "" where one can."""
    problem = devices.cuda_problem()
    return problem and f"{problem}, and MLA_CUDA_EMULATED names no emulated device"


def is_emulated() -> bool:
    """Whether the device under test is emulated, and slow."""
    return EMULATED in sys.modules


def cuda_module() -> Any:
    """The module under test, which is there where ``cuda_problem`` is empty."""
    return devices.cuda_module()


def cuda_backend() -> Any:
    """A backend of its own; skips the test where there is no device."""
    if problem := cuda_problem():
        pytest.skip(problem)
    return devices.open_cuda(0)
