"""A few questions to NVIDIA's management library, where a driver brought it."""

from __future__ import annotations

import ctypes
import os
import re
from ctypes import POINTER, byref, c_char_p, c_int, c_uint, c_ulonglong, c_void_p
from typing import Any, Final

_LIBRARY: Final = "libnvidia-ml.so.1"
_MEMORY_CLOCK: Final = 2
_NAME_BYTES: Final = 96
#: Both edges of the clock carry a word.
_WORDS_PER_CLOCK: Final = 2
#: The library's functions -> the types of their arguments; all return 0 where they succeed.
_FUNCTIONS: Final[dict[str, tuple[Any, ...]]] = {
    "nvmlInit_v2": (),
    "nvmlDeviceGetHandleByIndex_v2": (c_uint, POINTER(c_void_p)),
    "nvmlDeviceGetHandleByUUID": (c_char_p, POINTER(c_void_p)),
    "nvmlDeviceGetName": (c_void_p, c_char_p, c_uint),
    "nvmlDeviceGetMaxClockInfo": (c_void_p, c_int, POINTER(c_uint)),
    "nvmlDeviceGetMemoryBusWidth": (c_void_p, POINTER(c_uint)),
    "nvmlDeviceGetTotalEnergyConsumption": (c_void_p, POINTER(c_ulonglong)),
}


class Gpu:
    """One GPU as the driver sees it.

    Attributes:
        name: as CUDA calls it.
        memory_gbps: 1e9 bytes per second by clock and bus width; 0.0 where they are not told.
    """

    def __init__(self, library: Any, handle: c_void_p) -> None:
        """Use ``find_gpu``."""
        self._library = library
        self._handle = handle
        text = ctypes.create_string_buffer(_NAME_BYTES)
        known = library.nvmlDeviceGetName(handle, text, _NAME_BYTES) == 0
        self.name = text.value.decode("utf-8", "replace") if known else ""
        self.memory_gbps = self._memory_gbps()

    def _memory_gbps(self) -> float:
        clock_mhz, width_bits = c_uint(), c_uint()
        library, handle = self._library, self._handle
        failed = library.nvmlDeviceGetMaxClockInfo(handle, _MEMORY_CLOCK, byref(clock_mhz))
        failed = failed or library.nvmlDeviceGetMemoryBusWidth(handle, byref(width_bits))
        if failed:
            return 0.0
        return clock_mhz.value * 1e6 * _WORDS_PER_CLOCK * width_bits.value / 8 / 1e9

    def energy_j(self) -> float | None:
        """Joules since the driver was loaded; None where the GPU does not count them."""
        millijoules = c_ulonglong()
        failed = self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle, byref(millijoules))
        return None if failed else millijoules.value / 1e3


def find_gpu(number: int, name: str) -> Gpu | None:
    """The GPU that CUDA counts as ``number`` and calls ``name``; None where it is not found."""
    library = _load()
    if library is None:
        return None
    handle = c_void_p()
    found = _visible(number)
    if found.isdecimal():
        failed = library.nvmlDeviceGetHandleByIndex_v2(int(found), byref(handle))
    else:
        failed = library.nvmlDeviceGetHandleByUUID(found.encode(), byref(handle))
    if failed:
        return None
    gpu = Gpu(library, handle)
    # CUDA may count in another order, fastest first: what bears another name is another GPU.
    return gpu if gpu.name == name else None


def _visible(number: int) -> str:
    """The driver's number or UUID of what this process sees as ``number``."""
    visible = [p.strip() for p in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if number < len(visible) and re.fullmatch(r"\d+|GPU-[0-9a-f-]+", visible[number]):
        return visible[number]
    return str(number)


def _load() -> Any:
    """The library, ready; None without a driver, or with one older than these functions."""
    try:
        library = ctypes.CDLL(_LIBRARY)
        for function, types in _FUNCTIONS.items():
            getattr(library, function).argtypes = types
    except (OSError, AttributeError):
        return None
    return library if library.nvmlInit_v2() == 0 else None
