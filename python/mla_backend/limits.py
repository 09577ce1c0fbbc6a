"""What the machine can do at best: what the rates of a model are held against."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from mla_backend import _core
from mla_backend.nvml import Gpu

#: Beyond the caches of most sockets, within what small machines have, read within 50 ms.
READ_BYTES: Final = 256 << 20
#: The best of so many: a second thread or another process spoils one, seldom all.
_N_REPEATS: Final = 8
#: What 16 parts of 4 KiB per thread take; less cannot be probed.
_LEAST_BYTES_PER_THREAD: Final = 64 << 10


@dataclass(frozen=True)
class Limits:
    """Best rates of one device; 0 where the unit does not exist or nothing is known of it.

    Attributes:
        device: "cpu" or as in "cuda:0".
        name: of the processor.
        threads: that worked on it; 0 on GPUs.
        read_gbps: 1e9 bytes read from memory per second.
        f32_tops, bf16_tops, int8_tops: 1e12 operations per second, two per multiply-add.
        is_measured: False where the rate follows from clock and width of the memory.
    """

    device: str
    name: str
    threads: int
    read_gbps: float
    f32_tops: float = 0.0
    bf16_tops: float = 0.0
    int8_tops: float = 0.0
    is_measured: bool = True

    @property
    def tops(self) -> float:
        """Of the fastest unit; 0 where nothing is known."""
        return max(self.f32_tops, self.bf16_tops, self.int8_tops)


@cache
def cpu_limits(isa: str, threads: int, read_bytes: int = READ_BYTES) -> Limits:
    """Measure what ``threads`` threads reach with the instructions of ``isa``, once per process.

    Takes less than a second, and ``read_bytes`` of memory at most: a quarter of what is free where
    that is less. Other work on the machine lowers what is found.
    """
    backend = _core.CpuBackend(_core.ThreadPool(threads), isa)
    room = _core.available_memory_bytes() // 4
    n_bytes = max(min(read_bytes, room), threads * _LEAST_BYTES_PER_THREAD)
    peak = backend.measure_peak(n_bytes, _N_REPEATS)
    return Limits(
        "cpu",
        cpu_name(),
        threads,
        peak["read_bytes"] / 1e9,
        peak["f32_ops"] / 1e12,
        peak["bf16_ops"] / 1e12,
        peak["int8_ops"] / 1e12,
    )


def gpu_limits(device: str, gpu: Gpu) -> Limits:
    """What the driver says of a GPU's memory. How fast it multiplies is not known here."""
    return Limits(device, gpu.name, 0, gpu.memory_gbps, is_measured=False)


def cpu_name() -> str:
    """The CPU as its maker calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
