"""The reference models: their files, their expected values, and our logits for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from mla_backend import Model

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

#: Every GGUF of the reference models: (model, type).
FILES = [
    ("tiny-v2", "BF16"),
    ("tiny-v2", "Q8_0"),
    ("tiny-v2", "Q4_K_M"),
    ("tiny-v2", "Q2_K"),
    ("tiny-v2", "IQ4_XS"),
    ("tiny-v2", "legacy-Q4_K_M"),
    ("tiny-v3", "BF16"),
    ("tiny-v3", "Q6_K"),
    ("tiny-v3", "Q4_K_M"),
    ("tiny-v3", "Q3_K_M"),
]
MODES = ["absorbed", "expanded"]
PRECISIONS = ["exact", "fast"]
PROMPTS = ["short", "long"]
N_CTX = 704


@dataclass(frozen=True)
class Tolerances:
    """Limits on differences from the reference.

    d is the largest difference of the five best log-probabilities at a position; ``last`` is for
    the logits of the last position, ``top1`` for the share of positions with the same best token.
    """

    d_median: float
    d_p90: float
    last: float
    top1: float


_EXACT = Tolerances(1e-4, 1e-3, 1e-3, 0.99)
_FAST = {
    ("tiny-v2", True): Tolerances(0.06, 0.10, 0.2, 0.96),
    ("tiny-v3", True): Tolerances(0.08, 0.6, 0.25, 0.92),
    ("tiny-v2", False): Tolerances(0.24, 0.45, 0.7, 0.83),
    ("tiny-v3", False): Tolerances(0.32, 1.4, 1.2, 0.78),
}


def tolerances(model: str, type: str, precision: str) -> Tolerances:
    """The row of the table: float32, bf16 or 8-bit activations."""
    return _EXACT if precision == "exact" else _FAST[model, type == "BF16"]


def gguf_path(directory: Path, model: str, type: str) -> Path:
    return directory / model / "gguf" / f"{model}-{type}.gguf"


@cache
def expected(directory: Path, model: str, type: str) -> Mapping[str, Array]:
    with np.load(directory / model / "expected" / f"{type}.npz") as file:
        return dict(file)


@cache
def _facts(directory: Path, model: str, type: str) -> dict[str, Any]:
    text = (directory / model / "expected" / "llama_cpp.json").read_text()
    found: dict[str, Any] = json.loads(text)["files"][type]
    return found


def peer_distances(directory: Path, model: str, type: str) -> Mapping[str, Mapping[str, float]]:
    """How far llama.cpp is from the reference on the same file, by prompt."""
    found: dict[str, dict[str, float]]
    found = _facts(directory, model, type)["llama_cpp_vs_transformers"]
    return found


def perplexity_of_the_text(directory: Path, model: str, type: str) -> float:
    """What the reference gives for text.txt."""
    return float(_facts(directory, model, type)["perplexity"]["transformers_float32"])


@cache
def loaded(path: Path, attention: str, precision: str, device: str = "cpu") -> Model:
    """The model, kept for all tests: exact ones with a cache in float32, prompts in one chunk."""
    return Model.load(
        path,
        n_ctx=N_CTX,
        n_batch=N_CTX,
        threads=2,
        attention=attention,  # type: ignore[arg-type]
        precision=precision,
        cache_type="f32" if precision == "exact" else "f16",
        device=device,
    )


@cache
def our_logits(
    directory: Path,
    model: str,
    type: str,
    attention: str,
    precision: str,
    prompt: str,
    device: str = "cpu",
) -> Floats:
    """[T, vocab] of one of the two prompts."""
    ids = expected(directory, model, type)[f"{prompt}_ids"]
    engine = loaded(gguf_path(directory, model, type), attention, precision, device)
    return engine.logits(ids.tolist())


def log_probabilities(logits: Floats) -> npt.NDArray[np.float64]:
    """[T, vocab] -> the same, in float64."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=-1, keepdims=True)
    return wide - top - np.log(np.exp(wide - top).sum(axis=-1, keepdims=True))
