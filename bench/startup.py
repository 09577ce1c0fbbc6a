"""From process start to a model that is ready, beside the time that mapping its file takes.

    python bench/startup.py [MODEL]

Without a model it writes a shallow one with a vocabulary of 129,280 tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mla_backend.synth import shape_named, write_model

_VOCAB = 129280

#: What the measured processes run; they print when they were ready, on the system's clock.
_READY = """
import json, sys, time
started = time.monotonic()
from mla_backend import Model
imported = time.monotonic()
model = Model.load(sys.argv[1], n_ctx=64)
loaded = time.monotonic()
model.tokenizer.encode("ready")
print(json.dumps([started, imported, loaded, time.monotonic()]))
"""
_MAPPED = """
import json, mmap, sys, time
started = time.monotonic()
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE,
                           prot=mmap.PROT_READ)
print(json.dumps([started, time.monotonic()]))
"""


def main() -> None:
    """Print the steps and their medians."""
    parser = argparse.ArgumentParser(description="Measure the time to readiness.")
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("-r", "--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = options.model or _shallow_model(Path(directory))
        report = _measure(model, options.repeats)
    if options.json:
        print(json.dumps(report))
        return
    print("| step | seconds |\n|---|---:|")
    for step, seconds in report.items():
        print(f"| {step} | {seconds:.3f} |")


def _shallow_model(directory: Path) -> Path:
    shape = shape_named("tiny-v3", vocab=_VOCAB)
    return write_model(directory / "startup.gguf", shape, type="q4_k_m")[0]


def _measure(model: Path, repeats: int) -> dict[str, float]:
    _times(_READY, model)  # brings the file and the libraries into the page cache
    ready = [_times(_READY, model) for _ in range(repeats)]
    mapped = [_times(_MAPPED, model) for _ in range(repeats)]
    steps = ["start of Python", "imports", "load", "first use of the tokenizer"]
    report = {
        step: statistics.median(times[i + 1] - times[i] for times in ready)
        for i, step in enumerate(steps)
    }
    report["process start to ready"] = statistics.median(t[-1] - t[0] for t in ready)
    report["mapping alone, process start included"] = statistics.median(
        t[-1] - t[0] for t in mapped
    )
    return report


def _times(program: str, model: Path) -> list[float]:
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, str(model)], check=True, capture_output=True, text=True
    )
    return [begun, *json.loads(done.stdout.splitlines()[-1])]


if __name__ == "__main__":
    main()
