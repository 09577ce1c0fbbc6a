"""The training loop: short sequences first, then long ones under YaRN, at a rate that ends at 0."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demo_model.network import Network, Rotary
from demo_model.optimizer import optimizers
from demo_model.shape import Shape
from demo_model.tokens import BOS_ID, TokenFiles


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: passes over the training tokens, ``long_share`` of them in sequences of the full
            context with YaRN, which come last; the others without, of the short context.
        step_tokens: tokens per optimizer step.
        matrix_lr, other_lr: peak rates of Muon and AdamW. They rise for ``warmup`` steps and
            fall linearly to zero over the last ``falling`` of all steps.
        further_weight: of the prediction layer's loss; a third of it in long sequences.
        balance_rate: how far a step moves each expert's selection bias; scaled like the rates.
    """

    epochs: float = 12.0
    step_tokens: int = 32768
    matrix_lr: float = 0.01
    other_lr: float = 0.003
    decay: float = 0.4
    dropout: float = 0.1
    warmup: int = 100
    falling: float = 0.6
    long_share: float = 0.25
    further_weight: float = 0.3
    balance_rate: float = 0.002
    seed: int = 0


def make_deterministic(seed: int) -> None:
    """Let PyTorch use deterministic kernels only. Call it before the device is first used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    inductor = torch._inductor.config
    if hasattr(inductor, "deterministic"):
        inductor.deterministic = True


class Windows:
    """Training sequences: each begins with BOS and then the beginning of some line."""

    def __init__(self, files: TokenFiles, device: torch.device) -> None:
        stream = files.train
        after_line = np.isin(stream, [BOS_ID, *files.meta.newline_ids])
        self._line_starts: NDArray[np.intp] = np.flatnonzero(after_line[:-1]) + 1
        self._n = len(stream)
        self._stream = torch.from_numpy(stream.astype(np.int32)).to(device)

    def epoch(self, length: int, rng: np.random.Generator) -> NDArray[np.intp]:
        """Where to begin, in random order, so that ``length``-token windows cover the text."""
        wanted = np.arange(rng.integers(length), self._n - length - 2, length)
        found = np.minimum(np.searchsorted(self._line_starts, wanted), len(self._line_starts) - 1)
        begins = self._line_starts[found]
        return rng.permutation(begins[begins < self._n - length - 2])

    def cut(self, begins: NDArray[np.intp], length: int) -> Tensor:
        """Token ids [B, length + 2]: inputs, and two more as targets."""
        at = torch.from_numpy(begins).to(self._stream.device)[:, None]
        ids = self._stream[at + torch.arange(-1, length + 1, device=at.device)].long()
        ids[:, 0] = BOS_ID
        return ids

    def batches(
        self, length: int, size: int, n_steps: int, rng: np.random.Generator
    ) -> Iterator[Tensor]:
        """``n_steps`` times ids [size, length + 2], epoch after epoch."""
        queue = np.empty(0, np.intp)
        for _ in range(n_steps):
            while len(queue) < size:
                queue = np.concatenate([queue, self.epoch(length, rng)])
            yield self.cut(queue[:size], length)
            queue = queue[size:]


def train(
    shape: Shape,
    recipe: Recipe,
    files: TokenFiles,
    device: torch.device,
    on_log: Callable[[str], None],
) -> Network:
    """The trained network, in float32."""
    model = Network(shape, recipe.dropout).to(device)
    rng = np.random.default_rng(recipe.seed)
    windows = Windows(files, device)
    n_steps = int(recipe.epochs * len(files.train) / recipe.step_tokens)
    n_long = int(recipe.long_share * n_steps)
    parts = [(shape.short_context, n_steps - n_long, False), (shape.context, n_long, True)]
    loop = _Loop(model, recipe, n_steps, on_log)
    for length, n_part, yarn in parts:
        loop.rotary = Rotary(shape, yarn, device)
        loop.further_weight = recipe.further_weight / (3 if yarn else 1)
        for ids in windows.batches(length, recipe.step_tokens // length, n_part, rng):
            loop.step(ids)
    return model.eval()


class _Loop:
    """What one optimizer step needs."""

    rotary: Rotary
    further_weight: float

    def __init__(
        self, model: Network, recipe: Recipe, n_steps: int, on_log: Callable[[str], None]
    ) -> None:
        self._model, self._recipe, self._n_steps, self._log = model, recipe, n_steps, on_log
        self._optimizers = optimizers(model, recipe.matrix_lr, recipe.other_lr, recipe.decay)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["peak"] = group["lr"]
        self._losses = torch.compile(model.losses, dynamic=False)
        self._device = next(model.parameters()).device
        self._done, self._start = 0, time.monotonic()

    def step(self, ids: Tensor) -> None:
        """Learn from ids [B, T + 2]."""
        share = self._rate_share()
        with torch.autocast(self._device.type, torch.bfloat16):
            first, further, loads = self._losses(ids, self.rotary)
        (first + self.further_weight * further).backward()
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for gate, load in zip(self._model.gates(), loads.detach(), strict=True):
            shift = torch.sign(load.mean() - load) * (self._recipe.balance_rate * share)
            gate.e_score_correction_bias += shift
        self._done += 1
        if self._done % 100 == 0 or self._done in (1, 10, self._n_steps):
            self._report(ids, first, further, loads)

    def _rate_share(self) -> float:
        left = (self._n_steps - self._done) / (self._recipe.falling * self._n_steps)
        return min(1.0, (self._done + 1) / self._recipe.warmup, left)

    def _report(self, ids: Tensor, first: Tensor, further: Tensor, loads: Tensor) -> None:
        uneven = (loads.max(-1).values / loads.mean(-1)).max()
        self._log(
            f"step {self._done}/{self._n_steps} T={ids.shape[1] - 2} loss {first.item():.4f} "
            f"further {further.item():.4f} fullest expert {uneven.item():.2f} "
            f"{time.monotonic() - self._start:.1f} s"
        )
