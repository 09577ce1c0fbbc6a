"""Quantizing a whole file, beside llama.cpp: seconds, rates, peak memory, and the tensors' types.

python -m bench quantize-file MODEL [--types q8_0,q4_k_m] [--peer-python PYTHON]
python -m bench quantize-file --peer-python PYTHON --write tests/quantize/reference_types.json

The second form records which types llama.cpp gives the tensors of small models in every mix, for
the tests, which must not need it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from mla_backend.convert.mixes import MIXES, is_plain, mix_named
from mla_backend.gguf import read_gguf

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from quantize.models import LETTERS, MODELS, model

_OURS = """
import json, resource, sys, time
from mla_backend.quantize import quantize_file
started = time.perf_counter()
quantize_file(sys.argv[1], sys.argv[2], sys.argv[3], threads=int(sys.argv[4]))
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak": peak}))
"""


def main() -> None:
    """Measure, or write the reference."""
    parser = argparse.ArgumentParser(prog="bench quantize-file")
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--types", default="q8_0,q4_k_m")
    parser.add_argument("--peer-python", help="interpreter that has llama-cpp-python")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--write", type=Path, help="file for the types of llama.cpp")
    options = parser.parse_args()
    if options.write:
        options.write.write_text(json.dumps(_reference(options.peer_python), indent=1) + "\n")
    if options.model is None:
        return
    print("| type | ours, s | MB/s read | peak MB | peer, s | MB/s read | peak MB | types differ |")
    print("|---|" + "---:|" * 7)
    for type in options.types.split(","):
        print(_row(options.model, type, options.threads, options.peer_python), flush=True)


def _row(path: Path, type: str, threads: int, peer: str | None) -> str:
    n_bytes = path.stat().st_size
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        ours, theirs = Path(directory) / "ours.gguf", Path(directory) / "theirs.gguf"
        command = [sys.executable, "-c", _OURS, str(path), str(ours), type, str(threads)]
        measured = [json.loads(subprocess.check_output(command))]
        differ = ""
        if peer is not None:
            measured.append(_ask(peer, _request(path, theirs, type) | {"threads": threads}))
            differ = str(_types(ours) != _types(theirs))
        cells = [
            f"{m['seconds']:.2f} | {n_bytes / m['seconds'] / 1e6:.0f} | {m['peak'] / 1e6:.0f}"
            for m in measured
        ]
    return f"| {type} | {' | '.join(cells)} | {differ} |"


def _request(path: Path, out: Path, type: str) -> dict[str, Any]:
    keys = read_gguf(path).metadata
    return {
        "model": str(path),
        "out": str(out),
        "file_type": mix_named(type).file_type,
        "no_query_latent": "deepseek2.attention.q_lora_rank" not in keys,
    }


def _ask(python: str, request: dict[str, Any]) -> dict[str, Any]:
    program = str(Path(__file__).with_name("peer_quantize.py"))
    found = subprocess.run(
        [python, program], input=json.dumps(request), text=True, capture_output=True, check=True
    )
    answer: dict[str, Any] = json.loads(found.stdout)
    return answer


def _types(path: Path) -> dict[str, str]:
    return {name: info.format for name, info in read_gguf(path).tensors.items()}


# ---- reference -----------------------------------------------------------------------------------
def _reference(peer: str) -> dict[str, dict[str, str]]:
    """Letters of all tensors by model, then by "type" or "type with importance"."""
    reference: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in MODELS:
            guide = Path(directory) / f"{name}.npz"
            _write_importance(model(name), guide)
            reference[name] = {}
            for type, mix in MIXES.items():
                for with_importance in (False, True):
                    if mix.needs_importance and not with_importance:
                        continue
                    out = Path(directory) / "out.gguf"
                    request = _request(model(name), out, type) | {"threads": 2}
                    if with_importance:
                        request["importance"] = str(guide)
                    answer = _ask(peer, request)
                    assert answer["status"] == 0, (name, type, answer)
                    key = f"{type} with importance" if with_importance else type
                    reference[name][key] = _letters(out)
    return reference


def _letters(path: Path) -> str:
    letter = {format: letter for letter, format in LETTERS.items()}
    return "".join(letter[format] for _, format in sorted(_types(path).items()))


def _write_importance(path: Path, out: Path) -> None:
    columns = {
        name: np.ones(prod(info.shape[:-2]) * info.shape[-1], np.float32)
        for name, info in read_gguf(path).tensors.items()
        if not is_plain(name, info.shape)
    }
    np.savez(out, **columns)


if __name__ == "__main__":
    main()
