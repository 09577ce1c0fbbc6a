"""Prefill and decode rates of a model beside the machine's limits, and beside llama.cpp.

python bench/bench_model.py MODEL [-p 512] [-n 64] [-t 2] [-d 0] [--peer]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import machine
from cost import CostModel, Pass
from mla_backend import Model
from mla_backend.session import Session
from peer import Peer

#: Tokens fed before anything is timed: plans are made and pages come in.
_WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Result:
    """One phase of one program; rates by the median of the repeats."""

    phase: str
    program: str
    n_tokens: int
    depth: int
    tokens_per_s: float
    spread: float
    gb_s: float
    gflop_s: float
    roofline_tokens_per_s: float


class Ours:
    """A session of mla_backend under the same two commands as the peer."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def feed(self, ids: list[int], *, keep: int, one_by_one: bool = False) -> float:
        """Go back to ``keep`` positions and feed ``ids``; returns seconds."""
        self._session.truncate(keep)
        start = time.perf_counter()
        for step in [[i] for i in ids] if one_by_one else [ids]:
            self._session.feed(step)
        return time.perf_counter() - start


def main() -> int:
    """Measure and print."""
    options = _parse()
    costs = CostModel(options.model, options.cache_type)
    limits = machine.measure(options.threads)
    n_ctx = options.depth + max(options.prompt, options.generate, _WARM_UP_TOKENS)
    model = Model.load(
        options.model,
        n_ctx=n_ctx,
        threads=options.threads,
        attention=options.attention,
        cache_type=options.cache_type,
        precision=options.precision,
        n_batch=options.batch,
    )
    programs: dict[str, Ours | Peer] = {"mla_backend": Ours(model.session())}
    with ExitStack() as stack:
        if options.peer:
            peer = Peer(
                options.peer_python,
                options.model,
                n_ctx=n_ctx + _WARM_UP_TOKENS,
                threads=options.threads,
                n_batch=options.batch,
            )
            stack.callback(peer.close)
            programs[f"llama-cpp-python {peer.version}"] = peer
        results = _measure(options, programs, costs, limits)
    if options.json:
        for result in results:
            print(json.dumps(asdict(result)))
    else:
        _show(options, results, costs, limits)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure prefill and decode rates.")
    parser.add_argument("model", type=Path)
    parser.add_argument("-p", "--prompt", type=int, default=512, help="tokens of prefill")
    parser.add_argument("-n", "--generate", type=int, default=64, help="tokens of decoding")
    parser.add_argument("-d", "--depth", type=int, default=0, help="positions cached before")
    parser.add_argument("-t", "--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("-r", "--repeats", type=int, default=3)
    parser.add_argument("-b", "--batch", type=int, default=512, help="tokens per pass")
    parser.add_argument("--attention", choices=("auto", "absorbed", "expanded"), default="auto")
    parser.add_argument("--cache-type", "-ctk", default="f16")
    parser.add_argument("--precision", choices=("fast", "exact"), default="fast")
    parser.add_argument("--peer", action="store_true", help="run llama.cpp too, taking turns")
    parser.add_argument(
        "--peer-python", default=sys.executable, help="interpreter that has llama-cpp-python"
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON per result")
    return parser.parse_args()


def _measure(
    options: argparse.Namespace,
    programs: dict[str, Ours | Peer],
    costs: CostModel,
    limits: machine.Limits,
) -> list[Result]:
    # Random ids spread over the experts as text does; equal for all programs.
    draw = random.Random(0)
    ids = [draw.randrange(costs.config.n_vocab // 2) for _ in range(1 << 16)]
    depth, n_prompt, n_generate = options.depth, options.prompt, options.generate
    for program in programs.values():
        program.feed(ids[:_WARM_UP_TOKENS], keep=0)
        program.feed(ids[:2], keep=0, one_by_one=True)
        if depth:
            program.feed(ids[:depth], keep=0)
    times: dict[tuple[str, str], list[float]] = {}
    for repeat in range(options.repeats):
        begin = repeat * n_prompt % (len(ids) - n_prompt - n_generate)
        for name, program in programs.items():
            if n_prompt:
                took = program.feed(ids[begin : begin + n_prompt], keep=depth)
                times.setdefault(("prefill", name), []).append(took)
            if n_generate:
                part = ids[begin : begin + n_generate]
                took = program.feed(part, keep=depth, one_by_one=True)
                times.setdefault(("decode", name), []).append(took)
    passes = {
        "prefill": costs.prefill(n_prompt, depth, options.batch),
        "decode": costs.decode(n_generate, depth),
    }
    return [
        _result(phase, name, depth, passes[phase], took, limits)
        for (phase, name), took in sorted(times.items(), key=lambda item: item[0][0] != "prefill")
    ]


def _result(
    phase: str, name: str, depth: int, least: Pass, times: list[float], limits: machine.Limits
) -> Result:
    took = statistics.median(times)
    bound = least.seconds(limits.read_gb_s, limits.compute_gflop_s)
    return Result(
        phase=phase,
        program=name,
        n_tokens=least.n_tokens,
        depth=depth,
        tokens_per_s=least.n_tokens / took,
        spread=(max(times) - min(times)) / took,
        gb_s=least.n_bytes / took / 1e9,
        gflop_s=least.n_flops / took / 1e9,
        roofline_tokens_per_s=least.n_tokens / bound,
    )


def _show(
    options: argparse.Namespace, results: list[Result], costs: CostModel, limits: machine.Limits
) -> None:
    load = os.getloadavg()[0]
    print(f"{options.model.name}: {costs.file_bytes / 1e9:.2f} GB, ", end="")
    print(f"{costs.n_active_params / 1e9:.2f} B active weights per token")
    print(f"{machine.describe()}, {limits.threads} threads: ", end="")
    print(f"reads {limits.read_gb_s:.1f} GB/s, float32 {limits.fp32_gflop_s:.0f} GFLOP/s, ", end="")
    print(f"bfloat16 {limits.bf16_gflop_s:.0f}, int8 {limits.int8_gop_s:.0f} GOP/s")
    print(f"load average {load:.1f}, median of {options.repeats}\n")
    print(
        "| phase | depth | tokens | program | tokens/s | spread | GB/s | GFLOP/s "
        "| of roofline | ours / it |"
    )
    print("|---|---:|---:|---|---:|---:|---:|---:|---:|---:|")
    ours = {r.phase: r.tokens_per_s for r in results if r.program == "mla_backend"}
    for r in results:
        share = r.tokens_per_s / r.roofline_tokens_per_s
        print(
            f"| {r.phase} | {r.depth} | {r.n_tokens} | {r.program} | {r.tokens_per_s:.2f} "
            f"| {r.spread:.0%} | {r.gb_s:.1f} ({r.gb_s / limits.read_gb_s:.0%}) "
            f"| {r.gflop_s:.0f} ({r.gflop_s / limits.compute_gflop_s:.0%}) | {share:.0%} "
            f"| {ours[r.phase] / r.tokens_per_s:.2f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
