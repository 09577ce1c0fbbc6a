"""llama.cpp's quantizer through llama-cpp-python: one JSON request per line in, one answer out.

It uses nothing of mla_backend, so any interpreter that has llama_cpp can run it. Requests have the
paths "model" and "out", "file_type", "threads", and perhaps "importance", an .npz of float32 arrays
by tensor.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import time
from typing import Any


def main() -> None:
    """Serve until the input ends."""
    # llama.cpp writes to the standard output here and there: answers go to a copy of it.
    answers = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    for line in sys.stdin:
        request = json.loads(line)
        started_s = time.perf_counter()
        status = _quantize(request)
        seconds = time.perf_counter() - started_s
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer = {"status": status, "seconds": seconds, "peak": peak}
        print(json.dumps(answer), file=answers, flush=True)


def _quantize(request: dict[str, Any]) -> int:
    import llama_cpp  # type: ignore[import-not-found]

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = request["file_type"]
    params.nthread = request["threads"]
    # Without a query latent it demands the key, unless the depth is a published one.
    overrides = (llama_cpp.llama_model_kv_override * 2)()
    if request.get("no_query_latent"):
        overrides[0].key = b"deepseek2.attention.q_lora_rank"
        params.kv_overrides = ctypes.cast(
            overrides, ctypes.POINTER(llama_cpp.llama_model_kv_override)
        )
    importance, arrays = _importance(llama_cpp, request.get("importance"))
    if arrays:
        params.imatrix = ctypes.cast(importance, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    paths = request["model"].encode(), request["out"].encode()
    return int(llama_cpp.llama_model_quantize(*paths, ctypes.byref(params)))


def _importance(llama_cpp: Any, path: str | None) -> tuple[Any, list[Any]]:
    """The list as llama.cpp takes it, ended by an empty entry, and what keeps its memory."""
    import numpy as np

    named = dict(np.load(path)) if path else {}
    entries = (llama_cpp.llama_model_imatrix_data * (len(named) + 1))()
    arrays = []
    for entry, (name, values) in zip(entries, named.items(), strict=False):
        array = np.ascontiguousarray(values, np.float32)
        arrays.append(array)
        entry.name, entry.size = name.encode(), array.size
        entry.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries, arrays


if __name__ == "__main__":
    main()
