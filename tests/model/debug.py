"""Values inside a model: graphs that end early, or that show more than their logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from mla_backend import Model, _core, ops
from mla_backend.cache import LatentCache
from mla_backend.config import ModelConfig
from mla_backend.models.deepseek import build_graph
from mla_backend.models.inputs import BatchShape

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


def run_whole(
    model: Model,
    ids: Sequence[int],
    *,
    config: ModelConfig | None = None,
    n_outputs: int = 0,
    workspace: _core.Workspace | None = None,
) -> list[Array]:
    """One pass over a fresh prompt in a cache of its own -> all outputs of the graph."""
    config = config or model.config
    engine = model._engine
    cache = LatentCache(config, len(ids), model._cache_type, backend=model._backend)
    sequence = cache.add()
    n = len(ids)
    graph = build_graph(
        config, engine.weights, cache.layout, BatchShape(n, n_outputs, 1), engine.precision
    )
    executor = _core.Executor(graph, workspace or _core.Workspace([model._backend]))
    expanded = int(engine.attention == "expanded")
    inputs = {
        "ids": np.asarray(ids, np.int32),
        "positions": np.arange(n, dtype=np.int32),
        "cells": cache.reserve(sequence, n),
        "spans": np.array([[0, 0, n, sequence.first_cell, n, expanded]], np.int32),
        "block_table": cache.block_table[[sequence.row]],
    }
    if n_outputs:
        inputs["rows"] = np.arange(n - n_outputs, n, dtype=np.int32)
    executor.run(inputs)
    outputs: list[Array] = []
    while True:
        try:
            outputs.append(np.array(executor.output(len(outputs))))
        except ValueError:
            return outputs


def hidden_states(model: Model, ids: Sequence[int]) -> list[Floats]:
    """The last position, [D]: embedding, after each layer but the last, after the final norm."""
    config = model.config
    after = [
        run_whole(model, ids, config=replace(config, n_layer=n))[0][-1]
        for n in range(config.n_layer + 1)
    ]
    norm = model._engine.weights["output_norm.weight"].view()
    return [*after[:-1], ops.rms_norm(after[-1][None], norm, eps=config.rms_eps)[0]]


def routing(model: Model, ids: Sequence[int]) -> tuple[Array, Floats]:
    """Experts chosen and their weights, [MoE layers, T, active]."""
    route = _core.Graph.route

    def shown(graph: _core.Graph, *args: Any, **options: Any) -> Any:
        nodes = route(graph, *args, **options)
        for node in nodes:
            graph.output(node)
        return nodes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_core.Graph, "route", shown)
        outputs = run_whole(model, ids)[:-1]
    return np.stack(outputs[0::2]), np.stack(outputs[1::2])
