"""Small models whose tensor types under every mix were recorded from llama.cpp."""

from __future__ import annotations

from pathlib import Path

from small_models import small_model

REFERENCE = "reference_types.json"
#: Deep enough for every rule that counts layers; eight experts have rules of their own.
MODELS = {
    "deep": lambda: small_model("tiny-v3", "bf16", n_layer=24, vocab=1024),
    "eight-experts": lambda: small_model("tiny-v2", "bf16", n_layer=18, n_expert=8, vocab=1024),
    "legacy": lambda: small_model("tiny-v2", "bf16", "legacy", n_layer=17, vocab=1024),
    "tied": lambda: small_model("tiny-v3", "bf16", n_layer=2, tied=True, vocab=1024),
}
#: Formats in the reference are letters, one per tensor in the order of the model's names.
LETTERS = {
    "f": "F32",
    "h": "F16",
    "b": "BF16",
    "o": "Q4_0",
    "u": "Q4_1",
    "v": "Q5_0",
    "w": "Q5_1",
    "8": "Q8_0",
    "2": "Q2_K",
    "3": "Q3_K",
    "4": "Q4_K",
    "5": "Q5_K",
    "6": "Q6_K",
    "n": "IQ4_NL",
    "x": "IQ4_XS",
}


def model(name: str) -> Path:
    """Path of the model, written at first use."""
    return MODELS[name]()
