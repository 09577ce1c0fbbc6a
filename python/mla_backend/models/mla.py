"""Multi-head Latent Attention of one layer (DeepSeek-V2 paper, section 2.1; arXiv 2405.04434).

Only the latent c and the roped key are cached. Queries meet them either in the latent, with k_b and
v_b absorbed into query and output, or expanded to keys and values; the span list says which, run by
run, so one graph serves both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from mla_backend import _core

from .inputs import LayerContext
from .rope import rope_mscale


def attention(ctx: LayerContext, x: _core.Node, residual: _core.Node) -> _core.Node:
    """x [T, D] (normed) -> residual + attention(x) [T, D]; writes the layer's cache cells."""
    g, config = ctx.graph, ctx.config
    latent, heads = config.kv_lora_rank, config.n_head
    mscale = rope_mscale(config)

    q, kv = _projections(ctx, x)  # [T, H, N + R], [T, C + R]
    q_nope = g.slice(q, 2, 0, config.d_nope)
    q_rope = g.slice(q, 2, config.d_nope, config.d_key)
    q_rope = g.rope(q_rope, ctx.leaves.positions, ctx.leaves.frequencies, mscale)

    c = ctx.norm(g.slice(kv, 1, 0, latent), "attn_kv_a_norm.weight", config.latent_rms_eps)
    k_rope = g.slice(kv, 1, latent, config.d_cache)
    k_rope = g.rope(k_rope, ctx.leaves.positions, ctx.leaves.frequencies, mscale)

    planes = ctx.cache.layers[ctx.layer]
    cached = g.cache_write(
        g.state(f"cache.{ctx.layer}.latent", planes.latent),
        g.state(f"cache.{ctx.layer}.rope", planes.rope),
        c,
        k_rope,
        ctx.leaves.cells,
    )
    k_b, v_b = _key_value_up(ctx)
    attend = partial(
        g.mla_attention,
        q_nope,
        q_rope,
        *cached,
        k_b,
        spans=ctx.leaves.spans,
        block_table=ctx.leaves.block_table,
        scale=config.softmax_scale,
        k_b_transposed=config.layout == "legacy",
        block_cells=ctx.cache.block_cells,
        precision=ctx.precision,
        contraction=ctx.contraction,
    )
    observed = ctx.observer is not None
    out = _observed(ctx, attend, q_nope, c, v_b) if observed else attend(v_b=v_b)  # [T, H, V]
    flat = g.reshape(out, [out.shape[0], heads * config.d_value])
    return ctx.linear(flat, "attn_output.weight", residual)


def _projections(ctx: LayerContext, x: _core.Node) -> tuple[_core.Node, _core.Node]:
    """The larger product of x comes first: a device runs the other beside it."""
    config = ctx.config
    if config.q_lora_rank is None:
        q = ctx.linear(x, "attn_q.weight")
        kv = ctx.linear(x, "attn_kv_a_mqa.weight")
    else:
        q_a = ctx.linear(x, "attn_q_a.weight")
        kv = ctx.linear(x, "attn_kv_a_mqa.weight")
        q_a = ctx.norm(q_a, "attn_q_a_norm.weight", config.latent_rms_eps)
        q = ctx.linear(q_a, "attn_q_b.weight")
    return ctx.graph.reshape(q, [q.shape[0], config.n_head, config.d_key]), kv


def _observed(
    ctx: LayerContext,
    attend: Callable[..., _core.Node],
    q_nope: _core.Node,
    c: _core.Node,
    v_b: _core.Node,
) -> _core.Node:
    """What attend(v_b) gives, [T, H, V], with the inputs of k_b and v_b shown to the observer.

    Those of v_b are latents mixed by attention, [H, T, C]: what it gives with a unit matrix for
    v_b. A legacy file's kv_b meets the latents themselves.
    """
    if ctx.config.layout == "legacy":
        ctx.observe(c, "attn_kv_b.weight")
        return attend(v_b=v_b)
    g, (heads, _, latent) = ctx.graph, v_b.shape
    ctx.observe(g.permute(q_nope, [1, 0, 2]), "attn_k_b.weight")
    unit = _core.Tensor(np.eye(latent, dtype=np.float32), "F32", [latent, latent])
    mixed = attend(v_b=g.broadcast(g.weight("unit", unit), [heads, latent, latent]))
    mixed = g.permute(mixed, [1, 0, 2])
    ctx.observe(mixed, "attn_v_b.weight")
    return g.copy(g.permute(g.matmul(mixed, v_b, precision=ctx.precision), [1, 0, 2]), "F32")


def _key_value_up(ctx: LayerContext) -> tuple[_core.Node, _core.Node]:
    """k_b [H, C, N] (legacy: [H, N, C]) and v_b [H, V, C].

    A legacy file's kv_b [H * (N + V), C] holds both, head by head: they are views of its rows, and
    the key half is contracted across them.
    """
    g, config = ctx.graph, ctx.config
    if config.layout == "split":
        return ctx.weight("attn_k_b.weight"), ctx.weight("attn_v_b.weight")
    n_rows = config.d_nope + config.d_value
    kv_b = g.reshape(ctx.weight("attn_kv_b.weight"), [config.n_head, n_rows, config.kv_lora_rank])
    return g.slice(kv_b, 1, 0, config.d_nope), g.slice(kv_b, 1, config.d_nope, n_rows)
