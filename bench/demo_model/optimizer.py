"""Two optimizers: Muon for the matrices inside the layers, AdamW for everything else.

Muon steps along the orthogonalized momentum: all directions of a matrix learn at the same rate,
which gets more out of little text than AdamW does.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Fifth-order Newton-Schulz: brings singular values in (0, 1] near 1 within five steps.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """Nearly orthogonal matrices of the same row and column spaces: [n, r, c] -> [n, r, c]."""
    a, b, c = _COEFFICIENTS
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = (matrices if wide else matrices.mT).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized; parameters [.., r, c], decayed like AdamW's."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, decay: float) -> None:
        super().__init__(params, {"lr": lr, "decay": decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update; parameters of one shape are orthogonalized together."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
            for weight in group["params"]:
                by_shape.setdefault((weight.shape[-2], weight.shape[-1]), []).append(weight)
            for (rows, columns), weights in by_shape.items():
                self._update(weights, rows, columns, group)

    def _update(
        self, weights: list[nn.Parameter], rows: int, columns: int, group: dict[str, float]
    ) -> None:
        beta, lr = group["momentum"], group["lr"]
        ahead = []
        for weight in weights:
            momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
            momentum.lerp_(weight.grad, 1 - beta)
            ahead.append(weight.grad.lerp(momentum, beta).view(-1, rows, columns))
        steps = orthogonalize(torch.cat(ahead)).split([len(x) for x in ahead])
        scale = lr * max(1.0, rows / columns) ** 0.5
        for weight, step in zip(weights, steps, strict=True):
            weight.mul_(1 - lr * group["decay"])
            weight.add_(step.view_as(weight), alpha=-scale)


def optimizers(
    model: nn.Module, matrix_lr: float, other_lr: float, decay: float
) -> list[torch.optim.Optimizer]:
    """Muon and AdamW over the model's parameters, with their peak rates."""
    matrices, tables, others = [], [], []
    for name, weight in model.named_parameters():
        if "embed_tokens" in name or "lm_head" in name:
            tables.append(weight)
        elif weight.ndim < 2 or ".gate.weight" in name:
            others.append(weight)
        else:
            matrices.append(weight)
    adam_groups = [
        {"params": tables, "weight_decay": decay},
        {"params": others, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(adam_groups, lr=other_lr, betas=(0.9, 0.95), eps=1e-10, fused=True)
    return [Muon(matrices, matrix_lr, decay), adam]
