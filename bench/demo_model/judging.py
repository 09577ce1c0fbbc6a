"""What the trained network is worth: bits per byte on the held-out files, and samples."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from demo_model.network import Network, Rotary
from demo_model.tokens import BOS_ID, EOS_ID, TokenFiles

PROMPTS = (
    "def fibonacci(n):\n",
    "import os\nimport sys\n\n\ndef find_files(path, suffix):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "def read_lines(filename):\n    with open(",
    "The :mod:`json` module ",
    "for i in range(10):\n",
    "class TestQueue(unittest.TestCase):\n",
)

Logits = Callable[[Tensor], Tensor]


def network_logits(model: Network) -> Logits:
    """ids [B, T] -> logits [B, T, vocab] of the network under YaRN."""
    rotary = Rotary(model.shape, True, next(model.parameters()).device)
    return lambda ids: model(ids, rotary)


@torch.no_grad()
def bits_of_file(
    logits: Logits, ids: NDArray[np.uint16], context: int, device: torch.device
) -> float:
    """Bits that a document's text takes: ids [n] from BOS to EOS, neither of which counts.

    Every token sees at least half the context, or all that precedes it.
    """
    stride, bits = context // 2, 0.0
    tokens = torch.from_numpy(ids[:-1].astype(np.int64)).to(device)
    for begin in range(0, max(1, len(tokens) - 1 - stride), stride):
        window = tokens[begin : begin + context + 1].clone()
        window[0] = BOS_ID
        first = stride if begin else 0
        found = logits(window[None, :-1])[0, first:]
        loss = F.cross_entropy(found.float(), window[first + 1 :], reduction="sum")
        bits += loss.item() / math.log(2)
    return bits


def held_out_bits(
    logits: Logits, files: TokenFiles, context: int, device: torch.device
) -> dict[str, float]:
    """Bits of every held-out file."""
    pairs = zip(files.meta.held_names, files.held, strict=True)
    return {name: bits_of_file(logits, ids, context, device) for name, ids in pairs}


@torch.no_grad()
def sample(logits: Logits, prompt: list[int], n: int, temperature: float, seed: int) -> list[int]:
    """Up to ``n`` tokens that follow the prompt (which begins with BOS); greedy at 0."""
    rng = np.random.default_rng(seed)
    ids = list(prompt)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for _ in range(n):
        last = logits(torch.tensor([ids], device=device))[0, -1].double().cpu().numpy()
        token = int(last.argmax())
        if temperature > 0:
            p = np.exp((last - last.max()) / temperature)
            token = int(rng.choice(len(p), p=p / p.sum()))
        if token == EOS_ID:
            break
        ids.append(token)
    return ids[len(prompt) :]
