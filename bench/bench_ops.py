"""Single operations beside the machine's limits.

python bench/bench_ops.py [-t 2] [--isa avx2] [--only matmul] [--precision fast]
"""

from __future__ import annotations

import argparse
import json
import os
import time

import machine
from mla_backend import _core
from mla_backend.limits import Limits
from op_cases import Case, Operands, all_cases

#: A case runs at least this long and this often; its best time counts.
_MIN_SECONDS, _MIN_RUNS = 0.3, 3


def main() -> None:
    """Print one row per case."""
    parser = argparse.ArgumentParser(description="Measure single operations.")
    parser.add_argument("-t", "--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--isa", default="", help="default: MLA_CPU_ISA, or the best there is")
    parser.add_argument("--only", default="", help="names of operations begin with this")
    parser.add_argument("--precision", choices=("fast", "exact"), default="fast")
    parser.add_argument("--json", action="store_true", help="one line of JSON per case")
    options = parser.parse_args()
    backend = _core.CpuBackend(_core.ThreadPool(options.threads), options.isa)
    limits = machine.measure(options.threads, backend.isa)
    if not options.json:
        print(f"{machine.describe(limits)}, {options.threads} threads, {backend.isa}, ", end="")
        print(f"{options.precision}: reads {limits.read_gbps:.1f} GB/s, ", end="")
        print(f"at most {limits.tops * 1e3:.0f} GFLOP/s\n")
        print("| op | shape | us | GB/s | GFLOP/s | of roofline |")
        print("|---|---|---:|---:|---:|---:|")
    for case in all_cases(Operands(), options.precision):
        if case.op.startswith(options.only):
            _show(case, _seconds(case, backend), limits, backend.isa, options)


def _seconds(case: Case, backend: _core.CpuBackend) -> float:
    """Best time of one execution."""
    graph = _core.Graph()
    for i in range(case.n_copies):
        graph.output(case.build(graph, i))
    executor = _core.Executor(graph, _core.Workspace([backend]))
    executor.run({})
    times: list[float] = []
    while sum(times) < _MIN_SECONDS or len(times) < _MIN_RUNS:
        start = time.perf_counter()
        executor.run({})
        times.append(time.perf_counter() - start)
    return min(times) / case.n_copies


def _show(
    case: Case,
    seconds: float,
    limits: Limits,
    isa: str,
    options: argparse.Namespace,
) -> None:
    gb_s, gflop_s = case.n_bytes / seconds / 1e9, case.n_flops / seconds / 1e9
    share = max(gb_s / limits.read_gbps, gflop_s / limits.tops / 1e3)
    if options.json:
        row = {
            "op": case.op,
            "shape": case.shape,
            "isa": isa,
            "threads": options.threads,
            "precision": options.precision,
            "us": seconds * 1e6,
            "gb_s": gb_s,
            "gflop_s": gflop_s,
        }
        print(json.dumps(row), flush=True)
        return
    print(
        f"| {case.op} | {case.shape} | {seconds * 1e6:.1f} | {gb_s:.1f} | {gflop_s:.0f} "
        f"| {share:.0%} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
