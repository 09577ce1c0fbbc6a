"""The machine's limits: memory reads and multiply-adds, by number of threads.

python bench/machine.py [-t 1,2,4] [--isa avx2]
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict

from mla_backend import _core
from mla_backend.limits import Limits, cpu_limits

#: More than what the package reads for a quick look: beyond every cache that one socket has today.
_READ_BYTES = 1 << 30


def measure(threads: int, isa: str = "") -> Limits:
    """Measure with ``threads`` threads and the instructions of ``isa``, or the best there are."""
    return cpu_limits(isa or _core.available_isas()[0], threads, _READ_BYTES)


def describe(limits: Limits) -> str:
    """The CPU's name and how many processors this process may use."""
    return f"{limits.name}, {len(os.sched_getaffinity(0))} CPUs"


def main() -> None:
    """Print one row per number of threads."""
    parser = argparse.ArgumentParser(description="Measure this machine's limits.")
    parser.add_argument("-t", "--threads", default="", help="counts, separated by commas")
    parser.add_argument("--isa", default="", help="default: the best there is")
    parser.add_argument("--json", action="store_true", help="one line of JSON per count")
    options = parser.parse_args()
    available = len(os.sched_getaffinity(0))
    counts = [int(t) for t in options.threads.split(",") if t] or _powers(available)
    if not options.json:
        print("| threads | read GB/s | float32 TOPS | bfloat16 TOPS | int8 TOPS |")
        print("|---:|---:|---:|---:|---:|")
    for count in counts:
        found = measure(count, options.isa)
        if options.json:
            print(json.dumps(asdict(found)))
            continue
        print(
            f"| {count} | {found.read_gbps:.1f} | {found.f32_tops:.3f} "
            f"| {found.bf16_tops:.3f} | {found.int8_tops:.3f} |"
        )


def _powers(limit: int) -> list[int]:
    counts = [1 << i for i in range(limit.bit_length()) if 1 << i < limit]
    return [*counts, limit]


if __name__ == "__main__":
    main()
