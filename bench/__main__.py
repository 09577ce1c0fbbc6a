"""`python -m bench NAME ...`: runs one of the programs in this folder."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

_HERE = Path(__file__).parent
_PROGRAMS = {
    "convert": "a checkpoint to a file",
    "convert-peer": "the same, beside llama.cpp's tools",
    "cuda-model": "a model on a GPU",
    "cuda-products": "products on a GPU",
    "cuda-timeline": "where a decoded token's time goes on a GPU",
    "machine": "the machine's limits",
    "make": "write a random model",
    "model": "prefill and decode of a model: mla-backend bench",
    "ops": "single operations",
    "quantize": "encoders, beside ggml's",
    "quantize-file": "a file to a smaller one",
    "startup": "time to readiness",
}
_FILES = {
    "convert": "bench_convert",
    "convert-peer": "bench_convert_peer",
    "cuda-model": "cuda_model",
    "cuda-products": "cuda_products",
    "cuda-timeline": "cuda_timeline",
    "make": "make_model",
    "ops": "bench_ops",
    "quantize": "bench_quantize",
    "quantize-file": "bench_quantize_file",
}


def main() -> None:
    """Run the program that the first argument names; without one, the single operations."""
    name = sys.argv[1] if len(sys.argv) > 1 else "ops"
    if name not in _PROGRAMS:
        known = "\n".join(f"  {key:13} {value}" for key, value in _PROGRAMS.items())
        sys.exit(f"usage: python -m bench NAME [options]\n{known}")
    if name == "model":
        from mla_backend.cli import main as command

        sys.exit(command(["bench", *sys.argv[2:]]))
    sys.path.insert(0, str(_HERE))
    sys.argv = [f"bench {name}", *sys.argv[2:]]
    runpy.run_path(str(_HERE / f"{_FILES.get(name, name)}.py"), run_name="__main__")


main()
