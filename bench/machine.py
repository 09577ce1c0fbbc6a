"""The machine's limits: memory reads and multiply-adds, by number of threads.

python bench/machine.py [-t 1,2,4]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

_SOURCE = Path(__file__).with_name("peak.cpp")
_FLAGS = ["-std=c++20", "-O3", "-march=native", "-ffp-contract=fast", "-pthread", "-w"]


@dataclass(frozen=True)
class Limits:
    """Best rates of this machine with some number of threads; 0 where the CPU lacks the unit."""

    threads: int
    read_gb_s: float
    fp32_gflop_s: float
    int8_gop_s: float
    bf16_gflop_s: float

    @property
    def compute_gflop_s(self) -> float:
        """The fastest multiply-adds of any kind."""
        return max(self.fp32_gflop_s, self.int8_gop_s, self.bf16_gflop_s)


@cache
def measure(threads: int) -> Limits:
    """Measure with ``threads`` threads: a few seconds, and 1 GiB of memory.

    Needs g++. Other work on the machine lowers what is found.
    """
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "peak"
        subprocess.run(["g++", *_FLAGS, str(_SOURCE), "-o", str(program)], check=True)
        found = subprocess.run([program, str(threads)], check=True, capture_output=True, text=True)
    return Limits(threads, **json.loads(found.stdout))


def describe() -> str:
    """The CPU's name and how many processors this process may use."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name}, {len(os.sched_getaffinity(0))} CPUs"


def main() -> None:
    """Print one row per number of threads."""
    parser = argparse.ArgumentParser(description="Measure this machine's limits.")
    parser.add_argument("-t", "--threads", default="", help="counts, separated by commas")
    parser.add_argument("--json", action="store_true", help="one line of JSON per count")
    options = parser.parse_args()
    available = len(os.sched_getaffinity(0))
    counts = [int(t) for t in options.threads.split(",") if t] or _powers(available)
    if not options.json:
        print(f"{describe()}\n")
        print("| threads | read GB/s | float32 GFLOP/s | bfloat16 GFLOP/s | int8 GOP/s |")
        print("|---:|---:|---:|---:|---:|")
    for count in counts:
        found = measure(count)
        if options.json:
            print(json.dumps(asdict(found)))
            continue
        print(
            f"| {count} | {found.read_gb_s:.1f} | {found.fp32_gflop_s:.0f} "
            f"| {found.bf16_gflop_s:.0f} | {found.int8_gop_s:.0f} |"
        )


def _powers(limit: int) -> list[int]:
    counts = [1 << i for i in range(limit.bit_length()) if 1 << i < limit]
    return [*counts, limit]


if __name__ == "__main__":
    main()
