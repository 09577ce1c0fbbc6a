"""Encoders of every format: error and rate on one thread, beside ggml's where its library is there.

python -m bench quantize [--library LIBGGML_BASE] [--write tests/quantize/reference_errors.json]

Errors are mean squares over those of the library, weighted by importance where there is some; the
worst kind of numbers counts. `--write` keeps the library's errors for the tests, which must not
need it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from mla_backend import _core
from mla_backend.formats import FORMATS, Format

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from quantize.numbers import Floats, cases, importances, mean_squared_error

Bytes = npt.NDArray[np.uint8]
Encoder = Callable[[Floats, Format, Floats | None], Bytes]

_REPEATS = 5
#: Numbers whose rate is measured: they and their blocks stay in the cache of a core.
_ROWS = 64


def main() -> None:
    """Print one row per format; write the reference where asked to."""
    parser = argparse.ArgumentParser(prog="bench quantize")
    parser.add_argument("--library", type=Path, help="libggml-base.so of llama.cpp")
    parser.add_argument("--write", type=Path, help="file for the library's errors")
    options = parser.parse_args()
    peer = _peer(options.library) if options.library else None
    formats = [row for row in FORMATS if row.quantized]
    if peer is not None and options.write:
        options.write.write_text(json.dumps(_errors(peer, formats), indent=1) + "\n")
    names = [("none", ""), ("spread", " with importance")]
    print("| format | " + " | ".join(f"M numbers/s{t} | peer | worst error" for _, t in names))
    print("|---|" + "---:|" * 6)
    theirs = _errors(peer, formats) if peer is not None else None
    ours = _errors(_ours, formats)
    for row in formats:
        cells = [row.name]
        for name, _ in names:
            cells.append(f"{_rate(_ours, row, name):.0f}")
            cells.append(f"{_rate(peer, row, name):.0f}" if peer is not None else "")
            cells.append(_worst(ours[row.name], theirs[row.name], name == "none") if theirs else "")
        print("| " + " | ".join(cells) + " |", flush=True)


def _ours(x: Floats, format: Format, importance: Floats | None) -> Bytes:
    rows: Bytes = _core.quantize(x, format.name, importance, threads=1)
    return rows


def _peer(path: Path) -> Encoder:
    library = ctypes.CDLL(str(path))
    chunk = library.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]

    def encode(x: Floats, format: Format, importance: Floats | None) -> Bytes:
        rows, k = x.shape
        out = np.zeros((rows, format.n_bytes((k,))), np.uint8)
        weights = importance.ctypes.data if importance is not None else None
        library.ggml_quantize_init(format.gguf_type)
        chunk(format.gguf_type, x.ctypes.data, out.ctypes.data, 0, rows, k, weights)
        return out

    return encode


def _errors(encode: Encoder, formats: list[Format]) -> dict[str, dict[str, float]]:
    """Mean squared errors by format, then by "numbers/importance"."""
    return {
        row.name: {
            f"{kind}/{name}": mean_squared_error(
                _core.dequantize(encode(x, row, importance), row.name, x.shape[1]), x, importance
            )
            for kind, x in cases().items()
            for name, importance in importances().items()
        }
        for row in formats
    }


def _worst(ours: dict[str, float], theirs: dict[str, float], plain: bool) -> str:
    ratios = [
        ours[key] / theirs[key] for key in ours if key.endswith("/none") == plain and theirs[key]
    ]
    return f"{max(ratios):.3f}"


def _rate(encode: Encoder, format: Format, name: str) -> float:
    """Million numbers per second, the best of some runs, in time of this process."""
    importance = importances()[name]
    normal = cases()["normal"]
    x = np.concatenate([normal] * (_ROWS // len(normal)))
    best = float("inf")
    for _ in range(_REPEATS):
        started_s = time.thread_time()
        encode(x, format, importance)
        best = min(best, time.thread_time() - started_s)
    return x.size / best / 1e6


if __name__ == "__main__":
    main()
