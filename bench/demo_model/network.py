"""The network in PyTorch: DeepSeek-V3's layers, with all experts computed in one product.

Parameters carry the names of the released checkpoints, except that the experts of a layer (the
shared one last) are stacked; :mod:`demo_model.checkpoint` takes them apart. With eight experts it
is cheaper to compute every one and weight most by zero than to sort tokens, and it has no atomics.

Dimensions: B batch, T positions, D width, H heads, E experts (routed), I expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from demo_model.shape import Shape


class Norm(nn.Module):
    """RMS normalization over the last axis, in float32."""

    def __init__(self, n: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """x [.., n] -> [.., n], same dtype."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (wide * scale * self.weight).to(x.dtype)


class Linear(nn.Module):
    """A product without bias."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))

    def forward(self, x: Tensor) -> Tensor:
        """x [.., n_in] -> [.., n_out]."""
        return F.linear(x, self.weight)


class Rotary:
    """Cosine and sine [context, rope / 2], and the softmax scale that belongs to them."""

    def __init__(self, shape: Shape, yarn: bool, device: torch.device) -> None:
        rates = torch.tensor(shape.frequencies(yarn), device=device)
        angles = torch.arange(shape.context, device=device).float()[:, None] * rates
        self.cos, self.sin = angles.cos(), angles.sin()
        self.scale = shape.softmax_scale(yarn)

    def turn(self, x: Tensor) -> Tensor:
        """Rotate the pairs (2i, 2i+1): x [B, T, H, rope] -> same."""
        n = x.shape[1]
        cos, sin = self.cos[:n, None], self.sin[:n, None]
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
        return turned.flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head latent attention, uncompressed for training."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = s = shape
        self.q_a_proj = Linear(s.hidden, s.q_latent)
        self.q_a_layernorm = Norm(s.q_latent, 1e-6)
        self.q_b_proj = Linear(s.q_latent, s.n_head * (s.nope + s.rope))
        self.kv_a_proj_with_mqa = Linear(s.hidden, s.kv_latent + s.rope)
        self.kv_a_layernorm = Norm(s.kv_latent, 1e-6)
        self.kv_b_proj = Linear(s.kv_latent, s.n_head * (s.nope + s.value))
        self.o_proj = Linear(s.n_head * s.value, s.hidden)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        s = self.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).unflatten(-1, (s.n_head, -1))
        q_nope, q_rope = q.split((s.nope, s.rope), -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((s.kv_latent, s.rope), -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (s.n_head, -1))
        k_nope, v = kv.split((s.nope, s.value), -1)
        k_rope = rotary.turn(k_rope.unsqueeze(2)).expand(-1, -1, s.n_head, -1)
        q = torch.cat((q_nope, rotary.turn(q_rope)), -1).transpose(1, 2)
        k = torch.cat((k_nope, k_rope), -1).transpose(1, 2)
        # The flash kernels want values as wide as keys.
        v = F.pad(v, (0, s.nope + s.rope - s.value)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=rotary.scale)
        return self.o_proj(y[..., : s.value].transpose(1, 2).flatten(-2))


class Dense(nn.Module):
    """The feed-forward part of the first layers."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.hidden, shape.dense_width)
        self.up_proj = Linear(shape.hidden, shape.dense_width)
        self.down_proj = Linear(shape.dense_width, shape.hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x [B, T, D] -> [B, T, D], and no load."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), None


class Gate(nn.Module):
    """Which experts a token gets: sigmoid scores, selection by score + bias, weights without."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.empty(shape.n_expert, shape.hidden))
        self.register_buffer("e_score_correction_bias", torch.zeros(shape.n_expert))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, D] -> weights [B, T, E], zero where not selected, and load [E] (fractions)."""
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.sigmoid(F.linear(x.float(), self.weight.float()))
        chosen = (scores.detach() + self.e_score_correction_bias).topk(self.shape.n_active, -1)
        mask = F.one_hot(chosen.indices, self.shape.n_expert).sum(-2)
        weights = scores * mask
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.shape.routed_scale
        return weights, mask.flatten(0, 1).float().mean(0)


class Experts(nn.Module):
    """Routed experts and the shared one."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        n, width = shape.n_expert + 1, shape.expert_width
        self.gate = Gate(shape)
        self.gate_proj = nn.Parameter(torch.empty(n, width, shape.hidden))
        self.up_proj = nn.Parameter(torch.empty(n, width, shape.hidden))
        self.down_proj = nn.Parameter(torch.empty(n, shape.hidden, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, D] -> [B, T, D] and load [E]."""
        weights, load = self.gate(x)
        weights = F.pad(weights, (0, 1), value=1.0).to(x.dtype)
        gated = F.linear(x, self.gate_proj.flatten(0, 1))
        h = F.silu(gated) * F.linear(x, self.up_proj.flatten(0, 1))
        h = h.unflatten(-1, (len(self.gate_proj), -1)) * weights.unsqueeze(-1)
        return F.linear(h.flatten(-2), self.down_proj.transpose(0, 1).flatten(1)), load


class Layer(nn.Module):
    """Attention and feed-forward, each normalized before and added after."""

    def __init__(self, shape: Shape, dense: bool, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden, shape.norm_epsilon)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.hidden, shape.norm_epsilon)
        self.mlp = Dense(shape) if dense else Experts(shape)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor | None]:
        """x [B, T, D] -> [B, T, D] and the experts' load [E]."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rotary))
        y, load = self.mlp(self.post_attention_layernorm(x))
        return x + self.dropout(y), load


class Prediction(Layer):
    """The layer that predicts one token further, on the same embedding and output matrices."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__(shape, False, dropout)
        self.enorm = Norm(shape.hidden, shape.norm_epsilon)
        self.hnorm = Norm(shape.hidden, shape.norm_epsilon)
        self.eh_proj = Linear(2 * shape.hidden, shape.hidden)
        self.shared_head = nn.ModuleDict({"norm": Norm(shape.hidden, shape.norm_epsilon)})

    def join(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """Embedded next tokens and final states [B, T, D] -> the layer's input [B, T, D]."""
        return self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), -1))


class Network(nn.Module):
    """The whole model; the last of ``layers`` is the prediction layer."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden)
        layers: list[nn.Module] = [
            Layer(shape, i < shape.n_dense, dropout) for i in range(shape.n_layer)
        ]
        self.layers = nn.ModuleList([*layers, Prediction(shape, dropout)])
        self.norm = Norm(shape.hidden, shape.norm_epsilon)
        self.lm_head = Linear(shape.hidden, shape.vocab_size)
        self.dropout = nn.Dropout(dropout)
        self._initialize()

    def hidden(self, ids: Tensor, rotary: Rotary) -> tuple[Tensor, list[Tensor]]:
        """ids [B, T] -> normalized final states [B, T, D], loads [E] per layer with experts."""
        x, loads = self.dropout(self.embed_tokens(ids)), []
        for layer in self.layers[:-1]:
            x, load = layer(x, rotary)
            loads += [] if load is None else [load]
        return self.norm(x), loads

    def forward(self, ids: Tensor, rotary: Rotary) -> Tensor:
        """ids [B, T] -> logits [B, T, vocab]."""
        return self.lm_head(self.hidden(ids, rotary)[0])

    def losses(self, ids: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """ids [B, T + 2] -> mean loss of the next token, of the one after, loads [layers, E]."""
        n = ids.shape[1] - 2
        states, loads = self.hidden(ids[:, :n], rotary)
        extra = self.layers[-1]
        following = self.dropout(self.embed_tokens(ids[:, 1 : n + 1]))
        further, load = extra(extra.join(following, states), rotary)
        further = extra.shared_head["norm"](further)
        first = _loss(self.lm_head(states), ids[:, 1 : n + 1])
        second = _loss(self.lm_head(further), ids[:, 2:])
        return first, second, torch.stack([*loads, load])

    def gates(self) -> list[Gate]:
        """The routers, in the order of the loads."""
        return [module for module in self.modules() if isinstance(module, Gate)]

    def _initialize(self) -> None:
        depth = (2 * len(self.layers)) ** -0.5
        for name, weight in self.named_parameters():
            if weight.ndim >= 2:
                into_stream = "o_proj" in name or "down_proj" in name
                std = 0.5 * weight.shape[-1] ** -0.5 * (depth if into_stream else 1.0)
                nn.init.normal_(weight, std=0.02 if "lm_head" in name else std)


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
