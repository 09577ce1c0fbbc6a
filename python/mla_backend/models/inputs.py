"""What every graph of a model is given: the leaves of the graph, and the layers' weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from mla_backend import _core
from mla_backend.config import ModelConfig


def anywhere(name: str) -> str:
    """No device in particular."""
    return ""


class WeightSource(Protocol):
    """Bound weights by their declared names."""

    def __getitem__(self, name: str) -> _core.Tensor: ...

    def __contains__(self, name: str) -> bool: ...


@dataclass(frozen=True)
class BatchShape:
    """The extents that a graph is built for; all else is input.

    Attributes:
        n_tokens: new tokens, T.
        n_outputs: rows of logits.
        n_spans: rows of the span list, at most T sequences.
        contraction: which ones the spans ask for: "absorbed", "expanded", or "any".
        n_candidates: how many of the best logits of a row are picked out; 0: none.
    """

    n_tokens: int
    n_outputs: int
    n_spans: int
    contraction: str = "any"
    n_candidates: int = 0


@dataclass(frozen=True)
class CachePlanes:
    """One layer of the cache: latents [cells, C] and roped keys [cells, R]."""

    latent: _core.Tensor
    rope: _core.Tensor


@dataclass(frozen=True)
class CacheLayout:
    """The cache as a graph sees it."""

    layers: tuple[CachePlanes, ...]
    block_cells: int
    n_blocks: int


@dataclass(frozen=True)
class Leaves:
    """Input nodes of one graph."""

    ids: _core.Node  # I32 [T]
    positions: _core.Node  # I32 [T]
    cells: _core.Node  # I32 [T]: where each token's latent goes
    spans: _core.Node  # I32 [S, 6]: see csrc/graph/ops.h
    block_table: _core.Node  # I32 [S, blocks]: of the spans' sequences
    rows: _core.Node | None  # I32 [n_outputs]: tokens whose logits are wanted
    frequencies: _core.Node  # F32 [R / 2]


class Observer(Protocol):
    """Told what each product with weights is made of, while a graph is built."""

    def __call__(
        self, graph: _core.Graph, names: Sequence[str], x: _core.Node, ids: _core.Node | None
    ) -> None:
        """Rows x [.., M, K] meet the weights ``names``, as in ``Graph.square_sums``.

        With ids [T, A] these are experts, and x [T, K] or [T, A, K] has a row for each token, or
        for each of its experts.
        """


@dataclass(frozen=True)
class LayerContext:
    """What a layer needs to add itself to a graph."""

    graph: _core.Graph
    config: ModelConfig
    weights: WeightSource
    leaves: Leaves
    cache: CacheLayout
    precision: str
    layer: int
    contraction: str = "any"
    observer: Observer | None = None
    place: Callable[[str], str] = anywhere

    def has(self, name: str) -> bool:
        """Whether the layer has a weight of this name."""
        return f"blk.{self.layer}.{name}" in self.weights

    def weight(self, name: str) -> _core.Node:
        """The layer's weight of this name."""
        full = f"blk.{self.layer}.{name}"
        return self.graph.weight(full, self.weights[full])

    def linear(self, x: _core.Node, name: str, residual: _core.Node | None = None) -> _core.Node:
        """x [.., K] times the weight ``name`` [N, K] -> [.., N], plus ``residual``."""
        self.observe(x, name)
        with self.beside(name):
            return self.graph.matmul(x, self.weight(name), residual, self.precision)

    @contextmanager
    def beside(self, name: str) -> Iterator[None]:
        """Nodes made within are computed where the weight ``name`` lies, others with the layer."""
        self.graph.place_on(self.place(f"blk.{self.layer}.{name}"))
        try:
            yield
        finally:
            self.graph.place_on(self.place(f"blk.{self.layer}."))

    def observe(self, x: _core.Node, *names: str, ids: _core.Node | None = None) -> None:
        """Tell the observer, if there is one, that x meets the layer's weights ``names``."""
        if self.observer is not None:
            full = [f"blk.{self.layer}.{name}" for name in names]
            self.observer(self.graph, full, x, ids)

    def norm(self, x: _core.Node, name: str, eps: float) -> _core.Node:
        """x [.., D] normed and scaled by the weight ``name`` [D]."""
        return self.graph.rms_norm(x, self.weight(name), eps)
