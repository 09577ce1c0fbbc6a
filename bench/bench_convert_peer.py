"""Conversion beside llama.cpp's own tools on the same checkpoint: seconds, MB/s in, CPU, memory.

python -m bench convert-peer --source LLAMA_CPP --quantizer LLAMA_QUANTIZE --peer-python PYTHON
                             [--mb 1000] [--repeats 2] [--threads 2] [--keep DIR]

LLAMA_CPP is its source tree (``convert_hf_to_gguf.py`` and ``gguf-py``), PYTHON an interpreter with
what that needs (torch, transformers, sentencepiece). Its converter writes 16 bits or Q8_0; a mix
takes a second step, its quantizer. Tokenizers are left out on its side: it knows only published
ones. Both sides run as processes of their own and take turns.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench_convert import write_checkpoint

_THEIRS = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
from conversion.deepseek import DeepseekV2Model
DeepseekV2Model.set_vocab = lambda self: self.gguf_writer.add_tokenizer_model("no_vocab")
script = sys.argv[1] + "/convert_hf_to_gguf.py"
sys.argv = [script, *sys.argv[2:]]
runpy.run_path(script, run_name="__main__")
"""


@dataclass(frozen=True)
class Run:
    """What one process took: elapsed and CPU seconds, peak resident bytes."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def main() -> None:
    """Measure and print one line per way and repeat."""
    parser = argparse.ArgumentParser(prog="bench convert-peer")
    parser.add_argument("--source", type=Path, required=True, help="source tree of llama.cpp")
    parser.add_argument("--quantizer", type=Path, required=True, help="its llama-quantize")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--mb", type=int, default=1000, help="size of each checkpoint")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", type=Path, help="directory for the checkpoints, kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.keep or Path(scratch)
        for source in ("fp8", "bf16"):
            if not (directory / source / "config.json").exists():
                write_checkpoint(directory / source, source, options.mb * 1_000_000)
        for _ in range(options.repeats):
            for checkpoint, name, steps in _ways(options, directory):
                n_bytes = (directory / checkpoint / "model.safetensors").stat().st_size
                print(_row(name, n_bytes, [_run(step) for step in steps]), flush=True)
                for path in directory.glob("*.gguf"):
                    path.unlink()


def _ways(
    options: argparse.Namespace, directory: Path
) -> Iterator[tuple[str, str, list[list[str]]]]:
    """Checkpoint, name and commands of each way, ours and theirs in turn."""
    out, between = str(directory / "out.gguf"), str(directory / "between.gguf")

    def ours(source: str, type: str) -> list[str]:
        command = [sys.executable, "-m", "mla_backend", "convert", str(directory / source), out]
        return [*command, "--outtype", type, "--threads", str(options.threads)]

    def theirs(source: str, type: str, to: str) -> list[str]:
        command = [options.peer_python, "-c", _THEIRS, str(options.source)]
        return [*command, str(directory / source), "--outfile", to, "--outtype", type]

    def quantized(type: str) -> list[str]:
        return [str(options.quantizer), between, out, type, str(options.threads)]

    yield "fp8", "fp8 -> q4_k_m, ours", [ours("fp8", "q4_k_m")]
    yield "fp8", "fp8 -> q4_k_m, peer", [theirs("fp8", "bf16", between), quantized("Q4_K_M")]
    yield "bf16", "bf16 -> q8_0, ours", [ours("bf16", "q8_0")]
    yield "bf16", "bf16 -> q8_0, peer", [theirs("bf16", "q8_0", out)]


def _run(command: list[str]) -> Run:
    started_s = time.perf_counter()
    # The process is waited for by hand: that alone tells its own peak memory.
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"failed with {process.returncode}: {' '.join(command)}")
    seconds = time.perf_counter() - started_s
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def _row(name: str, n_bytes: int, runs: list[Run]) -> str:
    seconds = sum(run.seconds for run in runs)
    steps = " + ".join(f"{run.seconds:.1f}" for run in runs)
    return (
        f"{name}: {n_bytes / seconds / 1e6:.0f} MB/s in, {steps} s, "
        f"{sum(run.cpu_seconds for run in runs):.1f} s of CPU, "
        f"peak {max(run.peak_bytes for run in runs) / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
