"""What a pass through a model costs at least: bytes read and operations, from the file alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mla_backend import weights
from mla_backend.attention_mode import AttentionMode, HeadDims, expands
from mla_backend.batching import pass_sizes
from mla_backend.cache import bytes_per_position
from mla_backend.config import ModelConfig
from mla_backend.gguf import GGUFFile, TensorInfo


@dataclass(frozen=True)
class Pass:
    """Work on ``n_tokens`` new tokens.

    Attributes:
        n_bytes: read from memory.
        n_ops: multiplications and additions, two per weight and token.
        contractions: how attention was computed: "absorbed", "expanded" or both.
    """

    n_tokens: int
    n_bytes: float
    n_ops: float
    contractions: frozenset[str] = frozenset()

    def seconds(self, read_gbps: float, tops: float) -> float:
        """The least time on a machine with these limits (the roofline)."""
        return max(self.n_bytes / read_gbps / 1e9, self.n_ops / tops / 1e12)


def _is_head(tensor: TensorInfo) -> bool:
    return tensor.name in ("output.weight", "token_embd.weight")


class CostModel:
    """Costs of one model file. Activations are left out: they stay in caches."""

    def __init__(
        self, file: GGUFFile, config: ModelConfig, cache_type: str = "f16", isa: str = ""
    ) -> None:
        """``isa``: what attention is computed with, as ``expands`` takes it."""
        self._config = config
        self._isa = isa
        self._cache_bytes = bytes_per_position(config, cache_type)
        # The embedding is looked up row by row, unless it is the output matrix too.
        tensors = [
            tensor
            for name, tensor in weights.check(config, file).items()
            if config.tied_embeddings or name != "token_embd.weight"
        ]
        self._experts = [t for t in tensors if "_exps." in t.name]
        self._others = [t for t in tensors if "_exps." not in t.name]

    @property
    def n_active_params(self) -> float:
        """Weights that take part in one token."""
        shared = sum(math.prod(t.shape) for t in self._others)
        return shared + self._used_share() * sum(math.prod(t.shape) for t in self._experts)

    def _used_share(self) -> float:
        moe = self._config.moe
        return moe.n_expert_used / moe.n_expert if moe else 0.0

    def run(
        self, n_tokens: int, depth: int, *, outputs: int = 1, attention: AttentionMode = "auto"
    ) -> Pass:
        """One pass of ``n_tokens`` after ``depth`` cached positions, logits for ``outputs``.

        Experts are taken as chosen at random, so a long pass touches nearly all of them.
        """
        touched = 1 - (1 - self._used_share()) ** n_tokens
        weight_bytes: float = sum(t.n_bytes for t in self._others if outputs or not _is_head(t))
        weight_bytes += touched * sum(t.n_bytes for t in self._experts)
        head = self._config.n_vocab * self._config.d_model
        ops = 2 * n_tokens * (self.n_active_params - head) + 2 * outputs * head
        seen = depth + n_tokens
        expanded = expands(self._dims, attention, n_tokens, seen, self._isa)
        return Pass(
            n_tokens,
            weight_bytes + seen * self._cache_bytes,
            ops + self._attention_ops(n_tokens, depth, expanded),
            frozenset({"expanded" if expanded else "absorbed"}),
        )

    @property
    def _dims(self) -> HeadDims:
        c = self._config
        return HeadDims(c.kv_lora_rank, c.d_nope, c.d_rope, c.d_value)

    def _attention_ops(self, n_tokens: int, depth: int, expanded: bool) -> float:
        """Scores and weighted sums of causal attention, and expanding the past."""
        c = self._config
        pairs = n_tokens * (depth + (n_tokens + 1) / 2)
        if not expanded:
            per_layer = pairs * 2 * (2 * c.kv_lora_rank + c.d_rope)
        else:
            per_layer = pairs * 2 * (c.d_key + c.d_value)
            per_layer += depth * 2 * c.kv_lora_rank * (c.d_nope + c.d_value)
        return c.n_layer * c.n_head * per_layer

    def prefill(
        self, n_tokens: int, depth: int, n_batch: int, attention: AttentionMode = "auto"
    ) -> Pass:
        """``n_tokens`` in passes of ``n_batch``, added up."""
        passes = []
        done = 0
        for size in pass_sizes(n_tokens, n_batch):
            last = done + size == n_tokens
            passes.append(self.run(size, depth + done, outputs=int(last), attention=attention))
            done += size
        kinds = frozenset[str]().union(*(p.contractions for p in passes))
        return Pass(n_tokens, sum(p.n_bytes for p in passes), sum(p.n_ops for p in passes), kinds)

    def decode(self, n_tokens: int, depth: int, attention: AttentionMode = "auto") -> Pass:
        """``n_tokens`` one by one."""
        one = self.run(1, depth + n_tokens // 2, attention=attention)
        return Pass(n_tokens, n_tokens * one.n_bytes, n_tokens * one.n_ops, one.contractions)
