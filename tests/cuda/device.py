"""A CUDA device for tests: the machine's, else the emulated one of a build that has it."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import pytest


@lru_cache(maxsize=1)
def _module() -> Any:
    for name in ("_cuda", "_cuda_emulated"):
        try:
            module = import_module(f"mla_backend.{name}")
        except ModuleNotFoundError:
            continue
        if module.device_count():
            return module
    return None


def cuda_backend() -> Any:
    """A backend of its own; skips the test where there is no device."""
    module = _module()
    if module is None:
        pytest.skip("no CUDA device, and no emulated one in this build")
    return module.CudaBackend(0)
