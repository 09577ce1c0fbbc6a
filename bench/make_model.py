"""Write a random model of any shape.

python bench/make_model.py --shape v2-lite --type q4_k_m v2-lite.gguf
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from mla_backend.errors import MlaError
from mla_backend.synth import MIXES, SHAPES, shape_named, write_model


def main() -> int:
    """Write the file; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write a GGUF file of random weights.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="tiny-v2")
    parser.add_argument("--type", choices=MIXES, default="q4_k_m")
    parser.add_argument("--layout", choices=("split", "legacy"), default="split")
    parser.add_argument("--layers", type=int, help="layers in total")
    parser.add_argument("--experts", type=int, help="routed experts; 0 makes a dense model")
    parser.add_argument("--vocab", type=int, help="token ids")
    parser.add_argument("--context", type=int, help="trained length in positions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1, help="files to split into")
    options = parser.parse_args()
    start = time.monotonic()
    try:
        shape = shape_named(
            options.shape,
            layers=options.layers,
            experts=options.experts,
            vocab=options.vocab,
            context=options.context,
        )
        paths = write_model(
            options.path,
            shape,
            type=options.type,
            layout=options.layout,
            seed=options.seed,
            shards=options.shards,
            on_progress=_show if sys.stderr.isatty() else None,
        )
    except (MlaError, OSError) as error:
        print(f"make_model: {error}", file=sys.stderr)
        return 1
    n_bytes = sum(path.stat().st_size for path in paths)
    seconds = time.monotonic() - start
    print(f"{paths[0]}: {n_bytes / 1e9:.2f} GB in {seconds:.1f} s", file=sys.stderr)
    return 0


def _show(phase: str, done: int, total: int) -> None:
    end = "\n" if done == total else ""
    print(f"\r{phase} {done / 1e9:.1f} of {total / 1e9:.1f} GB", end=end, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
