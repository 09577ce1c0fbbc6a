"""Feed-forward of one layer: dense, or with routed and shared experts.

DeepSeekMoE: arXiv 2401.06066.
"""

from __future__ import annotations

from mla_backend import _core
from mla_backend.config import MoeConfig

from .inputs import LayerContext


def feed_forward(ctx: LayerContext, x: _core.Node, residual: _core.Node) -> _core.Node:
    """x [T, D] (normed) -> residual + ffn(x) [T, D]."""
    moe = ctx.config.moe
    if moe is None or ctx.layer < ctx.config.n_layer_dense:
        return _down(ctx, "", _gate_up(ctx, "", x), residual)
    return _mixture(ctx, moe, x, residual)


def _gate_up(ctx: LayerContext, suffix: str, x: _core.Node) -> _core.Node:
    ctx.observe(x, f"ffn_gate{suffix}.weight", f"ffn_up{suffix}.weight")
    with ctx.beside(f"ffn_gate{suffix}.weight"):
        return ctx.graph.swiglu_matmul(
            x,
            ctx.weight(f"ffn_gate{suffix}.weight"),
            ctx.weight(f"ffn_up{suffix}.weight"),
            precision=ctx.precision,
        )


def _down(ctx: LayerContext, suffix: str, hidden: _core.Node, residual: _core.Node) -> _core.Node:
    return ctx.linear(hidden, f"ffn_down{suffix}.weight", residual)


def _mixture(ctx: LayerContext, moe: MoeConfig, x: _core.Node, residual: _core.Node) -> _core.Node:
    """Shared experts stand between the steps of the routed ones, which do not wait for them."""
    g = ctx.graph
    shared = _gate_up(ctx, "_shexp", x) if moe.n_expert_shared else None
    ctx.observe(x, "ffn_gate_inp.weight")
    # The choice of experts is a cliff: its products are never rounded, whatever the precision.
    logits = g.matmul(x, ctx.weight("ffn_gate_inp.weight"), precision="exact")
    ids, weights = g.route(
        logits,
        ctx.weight("exp_probs_b.bias") if moe.has_bias else None,
        n_used=moe.n_expert_used,
        gating=moe.gating,
        n_groups=moe.n_group,
        n_groups_used=moe.n_group_used,
        group_score=moe.group_score,
        normalize=moe.weights_norm,
        scale=moe.weights_scale,
    )
    ctx.observe(x, "ffn_gate_exps.weight", "ffn_up_exps.weight", ids=ids)
    with ctx.beside("ffn_gate_exps.weight"):
        hidden = g.swiglu_matmul(
            x,
            ctx.weight("ffn_gate_exps.weight"),
            ctx.weight("ffn_up_exps.weight"),
            ids,
            ctx.precision,
        )  # [T, A, F]
    if shared is not None:
        residual = _down(ctx, "_shexp", shared, residual)
    ctx.observe(hidden, "ffn_down_exps.weight", ids=ids)
    with ctx.beside("ffn_down_exps.weight"):
        return g.matmul_indexed(
            hidden, ctx.weight("ffn_down_exps.weight"), ids, weights, residual, ctx.precision
        )
