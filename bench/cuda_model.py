"""Rates of a whole model on a CUDA device: prefill by length, decode by depth.

Usage: python -m bench cuda-model MODEL [--prompts 512,4096] [--depths 0,65536]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from mla_backend import Model


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Print one line per figure: tokens/s, the median of three runs after a first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=_numbers, default=[512, 4096, 16384])
    parser.add_argument("--depths", type=_numbers, default=[0, 4096, 16384, 65536])
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    n_ctx = max(*options.prompts, *options.depths) + 1024
    with Model.load(options.model, device="cuda", n_ctx=n_ctx) as model, model.session() as session:
        n_vocab = model.config.n_vocab
        for n in options.prompts:
            rates = []
            for _ in range(4):
                session.truncate(0)
                ids = rng.integers(0, n_vocab, n).tolist()
                started = time.perf_counter()
                session.feed(ids)
                rates.append(n / (time.perf_counter() - started))
            print(f"prefill {n}: {np.median(rates[1:]):.0f} tokens/s")
        for depth in options.depths:
            session.truncate(0)
            if depth:
                session.feed(rng.integers(0, n_vocab, depth).tolist())
            for _ in range(4):  # the second one is recorded
                session.feed(rng.integers(0, n_vocab, 1).tolist())
            started = time.perf_counter()
            for _ in range(options.tokens):
                session.feed(rng.integers(0, n_vocab, 1).tolist())
            rate = options.tokens / (time.perf_counter() - started)
            print(f"decode at {depth}: {rate:.0f} tokens/s")


if __name__ == "__main__":
    main()
