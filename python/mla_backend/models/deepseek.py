"""The graph of a DeepSeek V2 or V3 model, and of all that share the architecture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mla_backend import _core
from mla_backend.config import ModelConfig

from .inputs import (
    BatchShape,
    CacheLayout,
    LayerContext,
    Leaves,
    Observer,
    WeightSource,
    anywhere,
)
from .mla import attention
from .moe import feed_forward
from .rope import rope_frequencies

SPAN_FIELDS = 6  # sequence, first token, tokens, first cell, cells, expanded: csrc/graph/ops.h


def build_graph(
    config: ModelConfig,
    weights: WeightSource,
    cache: CacheLayout,
    shape: BatchShape,
    precision: str,
    observer: Observer | None = None,
    place: Callable[[str], str] = anywhere,
) -> _core.Graph:
    """One pass of ``shape.n_tokens`` tokens through the model.

    Inputs by name: ids, positions, cells I32 [T]; spans I32 [S, 6]; block_table I32 [S, blocks];
    rows I32 [n_outputs] if there are any. Output 0: logits F32 [n_outputs, vocab], or, without
    outputs and on demand, the hidden states F32 [T, D]. With ``shape.n_candidates`` the logits are
    there on demand, and outputs 1 to 3 are those of ``Graph.top_k``. An observer is told of every
    product with weights. ``place`` tells by the name of a weight where it lies, and so where it is
    multiplied.
    """
    g = _core.Graph()
    leaves = _leaves(g, config, cache, shape)
    g.place_on(place("token_embd.weight"))
    embedding = g.weight("token_embd.weight", weights["token_embd.weight"])
    x = g.get_rows(embedding, leaves.ids)  # [T, D]
    for layer in range(config.n_layer):
        ctx = LayerContext(
            g, config, weights, leaves, cache, precision, layer, shape.contraction, observer, place
        )
        g.place_on(place(f"blk.{layer}."))
        x = attention(ctx, ctx.norm(x, "attn_norm.weight", config.rms_eps), x)
        x = feed_forward(ctx, ctx.norm(x, "ffn_norm.weight", config.rms_eps), x)
    if leaves.rows is not None:
        g.place_on(place("output.weight"))
        x = g.get_rows(x, leaves.rows)  # [n_outputs, D]
        norm = g.weight("output_norm.weight", weights["output_norm.weight"])
        name = "token_embd.weight" if config.tied_embeddings else "output.weight"
        output = embedding if config.tied_embeddings else g.weight(name, weights[name])
        x = g.rms_norm(x, norm, config.rms_eps)
        if observer is not None:
            observer(g, [name], x, None)
        x = g.matmul(x, output, precision=precision)
    g.output(x, on_demand=shape.n_candidates > 0 or leaves.rows is None)
    if shape.n_candidates:
        for part in g.top_k(x, shape.n_candidates):
            g.output(part)
    return g


def _leaves(g: _core.Graph, config: ModelConfig, cache: CacheLayout, shape: BatchShape) -> Leaves:
    t = shape.n_tokens
    frequencies = rope_frequencies(config)
    return Leaves(
        ids=g.input("ids", "I32", [t]),
        positions=g.input("positions", "I32", [t]),
        cells=g.input("cells", "I32", [t]),
        spans=g.input("spans", "I32", [shape.n_spans, SPAN_FIELDS]),
        block_table=g.input("block_table", "I32", [shape.n_spans, cache.n_blocks]),
        rows=g.input("rows", "I32", [shape.n_outputs]) if shape.n_outputs else None,
        frequencies=g.weight(
            "rope_frequencies",
            _core.Tensor(np.ascontiguousarray(frequencies), "F32", [len(frequencies)]),
        ),
    )
