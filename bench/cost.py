"""What a pass through a model costs at least: bytes read and multiply-adds, from the file alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from mla_backend.attention_mode import HeadDims, expands
from mla_backend.cache import bytes_per_position
from mla_backend.config import ModelConfig, config_from_gguf
from mla_backend.gguf import TensorInfo, read_gguf


@dataclass(frozen=True)
class Pass:
    """One pass of ``n_tokens`` new tokens: bytes read from memory, floating-point operations."""

    n_tokens: int
    n_bytes: float
    n_flops: float

    def seconds(self, gb_s: float, gflop_s: float) -> float:
        """The least time on a machine with these limits (the roofline)."""
        return max(self.n_bytes / gb_s, self.n_flops / gflop_s) / 1e9


class CostModel:
    """Costs of one model file. Activations are left out: they stay in caches."""

    def __init__(self, path: str | Path, cache_type: str = "f16") -> None:
        file = read_gguf(path)
        self.config: ModelConfig = config_from_gguf(file)
        self.file_bytes = file.n_bytes
        self._cache_bytes = bytes_per_position(self.config, cache_type)
        tensors = [t for t in file.tensors.values() if self._is_read(t)]
        self._experts = [t for t in tensors if "_exps." in t.name]
        self._others = [t for t in tensors if "_exps." not in t.name]

    def _is_read(self, tensor: TensorInfo) -> bool:
        """The embedding is looked up row by row, unless it is the output matrix too."""
        return self.config.tied_embeddings or tensor.name != "token_embd.weight"

    @property
    def n_active_params(self) -> float:
        """Weights that take part in one token."""
        shared = sum(math.prod(t.shape) for t in self._others)
        return shared + self._used_share() * sum(math.prod(t.shape) for t in self._experts)

    def _used_share(self) -> float:
        moe = self.config.moe
        return moe.n_expert_used / moe.n_expert if moe else 0.0

    def run(self, n_tokens: int, depth: int, *, outputs: int = 1) -> Pass:
        """One pass of ``n_tokens`` after ``depth`` cached positions, logits for ``outputs``.

        Experts are taken as chosen at random, so a long pass touches nearly all of them.
        """
        touched = 1 - (1 - self._used_share()) ** n_tokens
        weight_bytes: float = sum(t.n_bytes for t in self._others)
        weight_bytes += touched * sum(t.n_bytes for t in self._experts)
        head = self.config.n_vocab * self.config.d_model
        flops = 2 * n_tokens * (self.n_active_params - head) + 2 * outputs * head
        seen = depth + n_tokens
        return Pass(
            n_tokens,
            weight_bytes + seen * self._cache_bytes,
            flops + self._attention_flops(n_tokens, depth),
        )

    def _attention_flops(self, n_tokens: int, depth: int) -> float:
        """Scores and weighted sums of causal attention, and expanding the past where that pays."""
        c = self.config
        pairs = n_tokens * (depth + (n_tokens + 1) / 2)
        dims = HeadDims(c.kv_lora_rank, c.d_nope, c.d_rope, c.d_value)
        if not expands(dims, "auto", n_tokens, depth + n_tokens, isa=""):
            per_layer = pairs * 2 * (2 * c.kv_lora_rank + c.d_rope)
        else:
            per_layer = pairs * 2 * (c.d_key + c.d_value)
            per_layer += depth * 2 * c.kv_lora_rank * (c.d_nope + c.d_value)
        return c.n_layer * c.n_head * per_layer

    def prefill(self, n_tokens: int, depth: int, n_batch: int) -> Pass:
        """``n_tokens`` in passes of ``n_batch``, added up."""
        passes = [
            self.run(min(n_batch, n_tokens - begin), depth + begin, outputs=0)
            for begin in range(0, n_tokens, n_batch)
        ]
        return Pass(n_tokens, sum(p.n_bytes for p in passes), sum(p.n_flops for p in passes))

    def decode(self, n_tokens: int, depth: int) -> Pass:
        """``n_tokens`` one by one."""
        middle = self.run(1, depth + n_tokens // 2)
        return Pass(n_tokens, n_tokens * middle.n_bytes, n_tokens * middle.n_flops)
