"""A whole model in float64, as the papers write it: keys and values in full, no latent tricks.

Reads the file with the `gguf` package, so neither the reader nor the weights are those under test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader
from gguf.quants import dequantize

from reference.rope import rope
from reference.route import route
from reference.softmax import softmax
from reference.swiglu import swiglu

F64 = npt.NDArray[np.float64]
Array = npt.NDArray[Any]
_LATENT_EPS = 1e-6


class ReferenceModel:
    """``logits`` of a file, one prompt at a time."""

    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        self._keys = {name: field.contents() for name, field in reader.fields.items()}
        self._weights = {
            tensor.name: dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
            for tensor in reader.tensors
        }
        self.n_layer = int(self._key("block_count"))
        self._n_head = int(self._key("attention.head_count"))
        self._rope_dims = int(self._key("rope.dimension_count"))
        legacy = "attention.key_length_mla" not in self._prefixed()
        suffix = "" if legacy else "_mla"
        self._nope = int(self._key(f"attention.key_length{suffix}")) - self._rope_dims
        self._value = int(self._key(f"attention.value_length{suffix}"))
        self._latent = int(self._key("attention.kv_lora_rank"))
        self._eps = float(self._key("attention.layer_norm_rms_epsilon"))

    def _prefixed(self) -> set[str]:
        return {name.removeprefix("deepseek2.") for name in self._keys}

    def _key(self, name: str, default: Any = None) -> Any:
        value = self._keys.get(f"deepseek2.{name}", default)
        assert value is not None, name
        return value

    def logits(self, ids: Sequence[int], positions: Sequence[int] | None = None) -> F64:
        """[T, vocab]; positions count from 0 unless they are given."""
        at = np.arange(len(ids)) if positions is None else np.asarray(positions)
        x = self._weights["token_embd.weight"][np.asarray(ids)]
        for layer in range(self.n_layer):
            w = _Layer(self._weights, layer)
            x = x + self._attention(w, _rms(x, w["attn_norm"], self._eps), at.astype(np.int32))
            x = x + self._feed_forward(w, layer, _rms(x, w["ffn_norm"], self._eps))
        x = _rms(x, self._weights["output_norm.weight"], self._eps)
        output = self._weights.get("output.weight", self._weights["token_embd.weight"])
        return x @ output.T

    # ---- attention ------------------------------------------------------------------------------

    def _attention(self, w: _Layer, x: F64, positions: npt.NDArray[np.int32]) -> F64:
        n, n_head, n_tokens = self._nope, self._n_head, len(x)
        if "attn_q" in w:
            q = x @ w["attn_q"].T
        else:
            q = _rms(x @ w["attn_q_a"].T, w["attn_q_a_norm"], _LATENT_EPS) @ w["attn_q_b"].T
        q = q.reshape(n_tokens, n_head, n + self._rope_dims)
        kv = x @ w["attn_kv_a_mqa"].T
        c = _rms(kv[:, : self._latent], w["attn_kv_a_norm"], _LATENT_EPS)
        turned_q = self._rope(q[..., n:], positions)
        turned_k = self._rope(kv[:, self._latent :], positions)
        k_b, v_b = self._expansions(w)
        out = np.zeros((n_tokens, n_head, self._value))
        mask = np.triu(np.full((n_tokens, n_tokens), -np.inf), 1)
        for head in range(n_head):
            key = np.concatenate([c @ k_b[head].T, turned_k], axis=1)
            query = np.concatenate([q[:, head, :n], turned_q[:, head]], axis=1)
            scores = query @ key.T * self._scale() + mask
            out[:, head] = softmax(scores, None, 1.0) @ (c @ v_b[head].T)
        return out.reshape(n_tokens, -1) @ w["attn_output"].T

    def _expansions(self, w: _Layer) -> tuple[F64, F64]:
        """k_b [H, N, C] and v_b [H, V, C]."""
        if "attn_kv_b" in w:
            kv_b = w["attn_kv_b"].reshape(self._n_head, self._nope + self._value, self._latent)
            return kv_b[:, : self._nope], kv_b[:, self._nope :]
        return w["attn_k_b"].swapaxes(1, 2), w["attn_v_b"]

    # ---- positions ------------------------------------------------------------------------------

    def _yarn_factor(self) -> float:
        is_yarn = self._key("rope.scaling.type", "none") == "yarn"
        return float(self._key("rope.scaling.factor", 1.0)) if is_yarn else 1.0

    def _scale(self) -> float:
        mscale = 1 + float(self._key("rope.scaling.yarn_log_multiplier", 0.0)) * math.log(
            self._yarn_factor()
        )
        return mscale * mscale / math.sqrt(self._nope + self._rope_dims)

    def _rope(self, x: F64, positions: npt.NDArray[np.int32]) -> F64:
        r, base = self._rope_dims, float(self._key("rope.freq_base"))
        plain = np.array([base ** (-2 * i / r) for i in range(r // 2)])
        factor = self._yarn_factor()
        frequencies = plain
        if factor > 1:
            original = float(self._key("rope.scaling.original_context_length"))
            fast = float(self._key("rope.scaling.yarn_beta_fast", 32.0))
            slow = float(self._key("rope.scaling.yarn_beta_slow", 1.0))
            # The pair that turns b times within the original context.
            ends = [r * math.log(original / (b * 2 * math.pi)) / (2 * math.log(base))
                    for b in (fast, slow)]  # fmt: skip
            low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), r - 1)
            keep = [1 - min(max((i - low) / max(high - low, 1e-3), 0), 1) for i in range(r // 2)]
            frequencies = plain / factor * (1 - np.array(keep)) + plain * np.array(keep)
        return rope(x, positions, frequencies.astype(np.float32), 1.0)

    # ---- feed-forward ---------------------------------------------------------------------------

    def _feed_forward(self, w: _Layer, layer: int, x: F64) -> F64:
        if "ffn_gate_inp" not in w:
            return _gated(x, w["ffn_gate"], w["ffn_up"], w["ffn_down"])
        sigmoid = int(self._key("expert_gating_func", 1)) == 2
        bias = w.bias("exp_probs_b")
        ids, weights = route(
            x @ w["ffn_gate_inp"].T,  # type: ignore[arg-type]
            bias,  # type: ignore[arg-type]
            n_used=int(self._key("expert_used_count")),
            gating="sigmoid" if sigmoid else "softmax",
            n_groups=int(self._key("expert_group_count", 1)),
            n_groups_used=int(self._key("expert_group_used_count", 1)),
            group_score="top2_sum" if sigmoid else "max",
            normalize=bool(self._key("expert_weights_norm", False)),
            scale=float(self._key("expert_weights_scale", 1.0)),
        )
        gate, up, down = w["ffn_gate_exps"], w["ffn_up_exps"], w["ffn_down_exps"]
        out = np.zeros_like(x)
        for t, (experts, shares) in enumerate(zip(ids, weights, strict=True)):
            for e, share in zip(experts, shares, strict=True):
                out[t] += share * _gated(x[t], gate[e], up[e], down[e])
        if "ffn_gate_shexp" in w:
            out += _gated(x, w["ffn_gate_shexp"], w["ffn_up_shexp"], w["ffn_down_shexp"])
        return out


class _Layer:
    """The weights of one layer by their short names."""

    def __init__(self, weights: dict[str, F64], layer: int) -> None:
        self._weights, self._layer = weights, layer

    def _full(self, name: str, kind: str = "weight") -> str:
        return f"blk.{self._layer}.{name}.{kind}"

    def __getitem__(self, name: str) -> F64:
        return self._weights[self._full(name)]

    def __contains__(self, name: str) -> bool:
        return self._full(name) in self._weights

    def bias(self, name: str) -> F64 | None:
        return self._weights.get(self._full(name, "bias"))


def _rms(x: F64, weight: F64, eps: float) -> F64:
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + eps) * weight


def _gated(x: F64, gate: F64, up: F64, down: F64) -> F64:
    return swiglu(x @ gate.T, x @ up.T) @ down.T
