"""The driven side of llama-cpp-python: see the package's docstring for what is said."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any, TextIO

#: llama.cpp's word for every layer.
_ALL_LAYERS = -1


def main() -> None:
    """Answer until the input ends."""
    # llama.cpp writes to the standard output here and there: answers go to a copy of it.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdin.readline()
    try:
        llama_cpp = importlib.import_module("llama_cpp")
    except ImportError as error:
        _say(answers, {"missing": str(error)})
        return
    _say(answers, {"version": llama_cpp.__version__})
    model = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "model" in request:
                model = load(llama_cpp, request)
                _say(answers, {})
            else:
                _say(answers, {"seconds": feed(llama_cpp, model, request)})
        except (ValueError, RuntimeError, AttributeError) as error:
            _say(answers, {"error": f"{type(error).__name__}: {error}"})


def load(llama_cpp: Any, request: dict[str, Any]) -> Any:
    """The model with flash attention, and the same threads and batch as ours."""
    options = {
        "model_path": request["model"],
        "n_ctx": request["n_ctx"],
        "n_batch": request["n_batch"],
        "n_ubatch": request["n_batch"],
        "n_threads": request["threads"],
        "n_threads_batch": request["threads"],
        "n_gpu_layers": _ALL_LAYERS if request["on_gpu"] else 0,
        "flash_attn": True,
        "verbose": False,
    }
    # Without a query latent it demands the key, unless the depth is a published one.
    override = None if request["has_query_latent"] else {"deepseek2.attention.q_lora_rank": 0}
    return llama_cpp.Llama(**options, kv_overrides=override)


def feed(llama_cpp: Any, model: Any, request: dict[str, Any]) -> float:
    """Seconds of the evaluation alone, until devices have done their work too."""
    ids = request["ids"]
    model.n_tokens = request["keep"]
    llama_cpp.llama_synchronize(model.ctx)
    start = time.perf_counter()
    for step in [[i] for i in ids] if request["one_by_one"] else [ids]:
        model.eval(step)
    llama_cpp.llama_synchronize(model.ctx)
    return time.perf_counter() - start


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
