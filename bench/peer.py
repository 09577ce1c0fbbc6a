"""llama.cpp through llama-cpp-python, driven from another process.

As a program it is the driven side: one JSON request per line in, one answer per line out. It uses
nothing of mla_backend, so any interpreter that has llama_cpp can run it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Peer:
    """A loaded model in another process; ``python`` is the interpreter to run there."""

    def __init__(self, python: str, model: str | Path, *, n_ctx: int, threads: int, n_batch: int):
        self._process = subprocess.Popen(
            [python, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        found = self._ask(model=str(model), n_ctx=n_ctx, threads=threads, n_batch=n_batch)
        self.version: str = found["version"]

    def feed(self, ids: list[int], *, keep: int, one_by_one: bool = False) -> float:
        """Go back to ``keep`` positions and feed ``ids``; returns seconds."""
        return float(self._ask(ids=ids, keep=keep, one_by_one=one_by_one)["seconds"])

    def close(self) -> None:
        """End the other process."""
        self._process.communicate()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError("the peer's process ended; its messages are above")
        found: dict[str, Any] = json.loads(answer)
        return found


def _serve() -> None:
    import os

    # llama.cpp writes to the standard output here and there: answers go to a copy of it.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import llama_cpp  # type: ignore[import-not-found]

    request = json.loads(sys.stdin.readline())
    model = _load(llama_cpp, request)
    print(json.dumps({"version": llama_cpp.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        ids = request["ids"]
        model.n_tokens = request["keep"]
        start = time.perf_counter()
        for step in [[i] for i in ids] if request["one_by_one"] else [ids]:
            model.eval(step)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


def _load(llama_cpp: Any, request: dict[str, Any]) -> Any:
    options = {
        "model_path": request["model"],
        "n_ctx": request["n_ctx"],
        "n_batch": request["n_batch"],
        "n_ubatch": request["n_batch"],
        "n_threads": request["threads"],
        "n_threads_batch": request["threads"],
        "n_gpu_layers": 0,
        "flash_attn": True,
        "verbose": False,
    }
    try:
        return llama_cpp.Llama(**options)
    except ValueError:
        # Without a query latent it demands the key, unless the depth is a published one.
        override = {"deepseek2.attention.q_lora_rank": 0}
        return llama_cpp.Llama(**options, kv_overrides=override)


if __name__ == "__main__":
    _serve()
