"""Rates of a whole model on a CUDA device: prefill by length, decode and generation by depth.

Usage: python -m bench cuda-model MODEL [--prompts 512,4096] [--depths 0,65536]

``decode`` feeds tokens that are known and takes all logits back. ``generate`` is what a user waits
for: tokens are chosen, text is decoded, chunks are made.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from mla_backend import Model, Session

#: Runs before the clock starts: a graph is recorded when it runs a second time.
_WARM_UP = 4
#: Ways to choose tokens that are measured.
_CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "at temperature 0.8": {"temperature": 0.8, "seed": 1},
    "from all logits": {"temperature": 0.8, "seed": 1, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
}


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


class Bench:
    """One session of a model, and the ids it is given."""

    def __init__(self, model: Model, session: Session) -> None:
        self._model = model
        self._session = session
        self._rng = np.random.default_rng(0)

    def ids(self, n: int) -> list[int]:
        """Random tokens."""
        found: list[int] = self._rng.integers(0, self._model.config.n_vocab, n).tolist()
        return found

    def prefill(self, n: int) -> float:
        """Tokens/s of a prompt, the median of three runs after a first."""
        rates = []
        for _ in range(4):
            self._session.truncate(0)
            ids = self.ids(n)
            started = time.perf_counter()
            self._session.feed(ids)
            rates.append(n / (time.perf_counter() - started))
        return float(np.median(rates[1:]))

    def go_to(self, depth: int) -> None:
        """Leave ``depth`` tokens in the session, computing only those it lacks."""
        self._session.truncate(min(depth, len(self._session.tokens)))
        if missing := depth - len(self._session.tokens):
            self._session.feed(self.ids(missing))

    def decode(self, n: int) -> float:
        """Tokens/s of single ones fed."""
        ids = self.ids(_WARM_UP + n)
        for token in ids[:_WARM_UP]:
            self._session.feed([token])
        started = time.perf_counter()
        for token in ids[_WARM_UP:]:
            self._session.feed([token])
        return n / (time.perf_counter() - started)

    def generate(self, n: int, options: dict[str, Any]) -> float:
        """Tokens/s of a stream that goes on from what the session holds."""
        prompt = [*self._session.tokens, *self.ids(1)]
        stream = self._model.stream(
            prompt, session=self._session, max_tokens=_WARM_UP + n, ignore_eos=True, **options
        )
        for _ in range(_WARM_UP):
            next(stream)
        started = time.perf_counter()
        n_chunks = sum(1 for _ in stream)
        return n_chunks / (time.perf_counter() - started)


def main() -> None:
    """Print one line per figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=_numbers, default=[512, 4096, 16384])
    parser.add_argument("--depths", type=_numbers, default=[0, 4096, 16384, 65536])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    n_ctx = max(*options.prompts, *options.depths) + 1024
    with (
        Model.load(options.model, device=options.device, n_ctx=n_ctx) as model,
        model.session() as session,
    ):
        bench = Bench(model, session)
        for n in options.prompts:
            print(f"prefill {n}: {bench.prefill(n):.0f} tokens/s", flush=True)
        for depth in sorted(options.depths):
            bench.go_to(depth)
            print(f"decode at {depth}: {bench.decode(options.tokens):.0f} tokens/s", flush=True)
            for name, choice in _CHOICES.items():
                bench.go_to(depth)
                rate = bench.generate(options.tokens, choice)
                print(f"generate at {depth}, {name}: {rate:.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
