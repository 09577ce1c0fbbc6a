"""Importance of a model's weights: it reads text, and the squares that meet each column are summed.

The graph of an observed session has a ``square_sums`` beside every product with weights; the sums
are memory of the collector, which all graphs of the session share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mla_backend import _core
from mla_backend.chunks import Chunks, Progress
from mla_backend.gguf import TensorInfo
from mla_backend.imatrix_file import Importance, InputSums
from mla_backend.likelihood import token_losses
from mla_backend.model import Model


@dataclass(frozen=True)
class _Sums:
    """State of one ``square_sums``: float32 [G, K], int32 [G]."""

    squares: npt.NDArray[np.float32]
    counts: npt.NDArray[np.int32]
    by_expert: bool


@dataclass
class Collector:
    """An observer that keeps the sums of all weights it is shown.

    Weights that share their input share the sums.
    """

    tensors: Mapping[str, TensorInfo]
    _sums: dict[str, _Sums] = field(default_factory=dict)

    def __call__(
        self, graph: _core.Graph, names: Sequence[str], x: _core.Node, ids: _core.Node | None
    ) -> None:
        """See ``Observer``."""
        sums = self._of(names, by_expert=ids is not None)
        if ids is not None and len(x.shape) == 2:
            x = graph.reshape(x, [x.shape[0], 1, x.shape[1]])
        graph.square_sums(
            graph.state(f"{names[0]} squares", _tensor(sums.squares, "F32")),
            graph.state(f"{names[0]} counts", _tensor(sums.counts, "I32")),
            x,
            ids,
        )

    def _of(self, names: Sequence[str], *, by_expert: bool) -> _Sums:
        if names[0] not in self._sums:
            *matrices, _, n_columns = self.tensors[names[0]].shape
            groups = math.prod(matrices)
            made = _Sums(
                np.zeros((groups, n_columns), np.float32), np.zeros(groups, np.int32), by_expert
            )
            self._sums |= dict.fromkeys(names, made)
        return self._sums[names[0]]

    def inputs(self) -> dict[str, InputSums]:
        """What was collected, by weight, in the groups of an importance file."""
        return {name: _as_inputs(sums) for name, sums in self._sums.items()}


def _tensor(array: npt.NDArray[np.float32] | npt.NDArray[np.int32], format: str) -> _core.Tensor:
    return _core.Tensor(array, format, list(array.shape))


def _as_inputs(sums: _Sums) -> InputSums:
    counts = sums.counts.astype(np.float32)
    if sums.by_expert:
        return InputSums(sums.squares.copy(), counts)
    # The matrices of a weight by head met equally many rows: one group, the heads in its row.
    return InputSums(sums.squares.reshape(1, -1).copy(), counts[:1])


@dataclass(frozen=True)
class Coverage:
    """Experts of one layer that no token was sent to.

    Attributes:
        layer: its number.
        unseen: ids of those experts.
        n_experts: how many the layer has.
        fewest: tokens of the expert that had the fewest.
    """

    layer: int
    unseen: tuple[int, ...]
    n_experts: int
    fewest: int


def coverage(importance: Importance) -> list[Coverage]:
    """One row for each layer with experts, in order."""
    rows = []
    for name, met in importance.weights.items():
        prefix, _, rest = name.removeprefix("blk.").partition(".")
        if rest == "ffn_down_exps.weight" and prefix.isdigit():
            rows.append(Coverage(int(prefix), met.unseen(), len(met.counts), int(met.counts.min())))
    return sorted(rows, key=lambda row: row.layer)


@dataclass(frozen=True)
class Collection:
    """What met the weights, and the perplexity of the text that was read."""

    importance: Importance
    perplexity: float


def collect(
    model: Model,
    chunks: Chunks,
    datasets: Sequence[str] = (),
    *,
    on_progress: Progress | None = None,
    on_chunk: Callable[[Callable[[], Importance]], None] | None = None,
) -> Collection:
    """Run chunks of text through a model and sum up what its weights meet.

    A model with split attention weights must be loaded with attention="absorbed": its inputs of
    k_b and v_b exist in that form only.

    Args:
        datasets: names of the texts, for the file.
        on_progress: called as ("text", tokens done, tokens in all).
        on_chunk: called after each chunk with a function that gives the importance so far.

    Raises MemoryLimitError where cache or workspace do not fit.
    """
    collector = Collector(model.file.tensors)
    n_ctx, total = chunks.n_ctx, chunks.fed.size
    losses: list[npt.NDArray[np.float64]] = []

    def so_far() -> Importance:
        return Importance(collector.inputs(), tuple(datasets), len(losses), n_ctx)

    with model.session(n_ctx, observer=collector) as session:
        for index, ids in enumerate(chunks.fed):
            if on_progress is not None:
                on_progress("text", index * n_ctx, total)
            session.truncate(0)
            logits = session.feed(ids.tolist(), outputs=n_ctx)
            losses.append(token_losses(logits[chunks.first_scored : -1], chunks.targets(index)))
            if on_chunk is not None:
                on_chunk(so_far)
    if on_progress is not None:
        on_progress("text", total, total)
    return Collection(so_far(), float(np.exp(np.concatenate(losses).mean())))
