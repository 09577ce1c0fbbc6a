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
    """``logits`` of a file, one prompt at a time.

    Attributes:
        squares: by weight and then by matrix of it (expert or head, else 0): the squares of its
            inputs, summed over the rows of all prompts so far.
        rows: likewise, the number of those rows.
    """

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
        self.squares: dict[str, dict[int, F64]] = {}
        self.rows: dict[str, dict[int, int]] = {}

    def _meet(self, x: F64, *names: str, matrix: int = 0) -> None:
        """Note that rows x [T, K] are multiplied with the weights ``names``."""
        for name in names:
            squares = self.squares.setdefault(name, {})
            squares[matrix] = squares.get(matrix, 0) + np.square(x).sum(axis=0)
            rows = self.rows.setdefault(name, {})
            rows[matrix] = rows.get(matrix, 0) + len(x)

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
        name = "output.weight" if "output.weight" in self._weights else "token_embd.weight"
        self._meet(x, name)
        return x @ self._weights[name].T

    # ---- attention ------------------------------------------------------------------------------

    def _attention(self, w: _Layer, x: F64, positions: npt.NDArray[np.int32]) -> F64:
        n, n_head, n_tokens = self._nope, self._n_head, len(x)
        self._meet(x, w.full("attn_q" if "attn_q" in w else "attn_q_a"), w.full("attn_kv_a_mqa"))
        if "attn_q" in w:
            q = x @ w["attn_q"].T
        else:
            q_a = _rms(x @ w["attn_q_a"].T, w["attn_q_a_norm"], _LATENT_EPS)
            self._meet(q_a, w.full("attn_q_b"))
            q = q_a @ w["attn_q_b"].T
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
            shares = softmax(query @ key.T * self._scale() + mask, None, 1.0)
            out[:, head] = shares @ (c @ v_b[head].T)
            self._meet(q[:, head, :n], w.full("attn_k_b"), matrix=head)
            self._meet(shares @ c, w.full("attn_v_b"), matrix=head)
        joined = out.reshape(n_tokens, -1)
        self._meet(joined, w.full("attn_output"))
        return joined @ w["attn_output"].T

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
            return self._gated(w, x, "")
        self._meet(x, w.full("ffn_gate_inp"))
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
        out = np.zeros_like(x)
        for t, (experts, shares) in enumerate(zip(ids, weights, strict=True)):
            for e, share in zip(experts, shares, strict=True):
                out[t] += share * self._gated(w, x[t : t + 1], "_exps", int(e))[0]
        if "ffn_gate_shexp" in w:
            out += self._gated(w, x, "_shexp")
        return out

    def _gated(self, w: _Layer, x: F64, suffix: str, expert: int | None = None) -> F64:
        names = [f"ffn_{part}{suffix}" for part in ("gate", "up", "down")]
        gate, up, down = (w[name] if expert is None else w[name][expert] for name in names)
        hidden = swiglu(x @ gate.T, x @ up.T)
        self._meet(x, w.full(names[0]), w.full(names[1]), matrix=expert or 0)
        self._meet(hidden, w.full(names[2]), matrix=expert or 0)
        return hidden @ down.T


class _Layer:
    """The weights of one layer by their short names."""

    def __init__(self, weights: dict[str, F64], layer: int) -> None:
        self._weights, self._layer = weights, layer

    def full(self, name: str, kind: str = "weight") -> str:
        """The name in the file."""
        return f"blk.{self._layer}.{name}.{kind}"

    def __getitem__(self, name: str) -> F64:
        return self._weights[self.full(name)]

    def __contains__(self, name: str) -> bool:
        return self.full(name) in self._weights

    def bias(self, name: str) -> F64 | None:
        return self._weights.get(self.full(name, "bias"))


def _rms(x: F64, weight: F64, eps: float) -> F64:
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + eps) * weight
