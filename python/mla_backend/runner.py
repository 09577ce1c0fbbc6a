"""Runs batches through a model: one planned graph per batch shape, kept and re-run."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from mla_backend import _core
from mla_backend.attention_mode import AttentionMode, HeadDims, expands
from mla_backend.cache import CacheSequence, LatentCache
from mla_backend.candidates import N_CANDIDATES, Candidates, Enough, LogitsRow
from mla_backend.config import ModelConfig
from mla_backend.errors import ShapeError
from mla_backend.loading import Weights
from mla_backend.locks import CallLock
from mla_backend.models.deepseek import SPAN_FIELDS, build_graph
from mla_backend.models.inputs import BatchShape, Observer, anywhere

#: Graphs kept at a time. Decoding and full chunks take two; the rest are ends of prompts.
_MAX_GRAPHS: Final = 16
_BUSY: Final = "a signal handler cannot use the model that its own thread is running"

Logits = npt.NDArray[np.float32]
#: Called amid a pass as (steps done, steps in all).
OnSteps = Callable[[int, int], None]


@dataclass(frozen=True)
class Piece:
    """New tokens of one sequence.

    Attributes:
        outputs: how many of the last tokens' logits are wanted.
    """

    sequence: CacheSequence
    ids: Sequence[int]
    outputs: int = 1


@dataclass(frozen=True)
class Engine:
    """What the runners of one model share.

    Attributes:
        workspace: arenas and scratch; one run at a time, which ``lock`` sees to.
        isa: what attention is computed with: a CPU's instruction set, or "cuda".
        place: where a weight lies, by its name.
        uploads: the weights that lie in the memory of devices.
    """

    config: ModelConfig
    weights: Weights
    workspace: _core.Workspace
    precision: str
    attention: AttentionMode
    isa: str
    place: Callable[[str], str] = anywhere
    uploads: tuple[_core.Uploaded, ...] = ()
    lock: CallLock = field(default_factory=lambda: CallLock(_BUSY))


class Runner:
    """Computes logits for pieces of the sequences of one cache.

    Attributes:
        attention: the engine's mode at first; may be changed between runs.
    """

    def __init__(
        self, engine: Engine, cache: LatentCache, observer: Observer | None = None
    ) -> None:
        self.attention: AttentionMode = engine.attention
        self._engine = engine
        self._cache = cache
        self._observer = observer
        config = engine.config
        self._dims = HeadDims(config.kv_lora_rank, config.d_nope, config.d_rope, config.d_value)
        self._n_candidates = min(N_CANDIDATES, config.n_vocab)
        self._executors: OrderedDict[BatchShape, _core.Executor] = OrderedDict()

    @property
    def lock(self) -> CallLock:
        """Held while the model runs; also for changes to caches between runs."""
        return self._engine.lock

    def run(
        self,
        pieces: Sequence[Piece],
        cancel: _core.CancelToken | None = None,
        on_steps: OnSteps | None = None,
    ) -> Logits:
        """One pass over all pieces, which may stand at different positions.

        Returns float32 [sum of outputs, vocab] in the order of the pieces. Raises ContextError
        before computing where the cache has no room, CancelledError; then no sequence has changed.
        """
        shape = self._shape(pieces)
        with self._engine.lock, self._pass(pieces, shape, cancel, on_steps) as executor:
            if not shape.n_outputs:
                return np.empty((0, self._engine.config.n_vocab), np.float32)
            return executor.output(0).copy()  # the arena is the next run's

    def run_for(
        self,
        pieces: Sequence[Piece],
        enough: Sequence[Enough],
        cancel: _core.CancelToken | None = None,
    ) -> list[LogitsRow]:
        """Like ``run``, of pieces with one output each: candidates where they are enough of a row.

        The logits of the other rows are float32 [vocab].
        """
        if len(enough) != len(pieces) or any(piece.outputs != 1 for piece in pieces):
            raise ShapeError("candidates are of one output to a piece, each with its own use")
        shape = self._shape(pieces, self._n_candidates)
        with self._engine.lock, self._pass(pieces, shape, cancel) as executor:
            ids, values, totals = (executor.output(i).copy() for i in (1, 2, 3))
            rows: list[LogitsRow] = []
            for i, is_enough in enumerate(enough):
                total = float(totals[i, 0])
                best = Candidates(ids[i], values[i], total, self._engine.config.n_vocab)
                rows.append(best if is_enough(best) else executor.output(0)[i].copy())
            return rows

    @contextmanager
    def _pass(
        self,
        pieces: Sequence[Piece],
        shape: BatchShape,
        cancel: _core.CancelToken | None,
        on_steps: OnSteps | None = None,
    ) -> Iterator[_core.Executor]:
        """Run a batch, and count its tokens once its outputs are taken.

        Where either fails, no sequence has changed.
        """
        try:
            inputs = self._inputs(pieces, shape)
            executor = self._executor(shape)
            # Chunks without logits are not waited for: several devices work on several.
            executor.run(inputs, cancel, wait=shape.n_outputs > 0, on_steps=on_steps)
            self._engine.weights.check()
            yield executor
        except BaseException:
            for piece in pieces:
                self._cache.release(piece.sequence)
            raise
        for piece in pieces:
            self._cache.commit(piece.sequence, len(piece.ids))

    def prepare(self, n_tokens: int) -> None:
        """Plan a batch of one piece ahead, so that its memory is taken before it is computed.

        A single token is one that is generated, and chosen from candidates.
        """
        contraction = self._contraction([(n_tokens, n_tokens)])
        n_candidates = self._n_candidates if n_tokens == 1 else 0
        self._executor(BatchShape(n_tokens, 1, 1, contraction, n_candidates))

    def refusals(self) -> list[str]:
        """Why nodes of the plans made so far are not where they were wanted, each reason once."""
        found = dict.fromkeys(
            reason for plan in self._executors.values() for reason in plan.report()["refusals"]
        )
        return list(found)

    def report(self, shape: BatchShape) -> dict[str, object]:
        """The plan of a shape: arena and scratch bytes, steps by backend."""
        return self._executor(shape).report()

    def _shape(self, pieces: Sequence[Piece], n_candidates: int = 0) -> BatchShape:
        if not pieces or not all(len(piece.ids) for piece in pieces):
            raise ShapeError("a batch needs one piece or more, each of one token or more")
        if len({piece.sequence.row for piece in pieces}) != len(pieces):
            raise ShapeError("a batch holds one piece of a sequence at most")
        if not all(0 <= piece.outputs <= len(piece.ids) for piece in pieces):
            raise ShapeError("a piece gives at most one row of logits for each of its tokens")
        seen = [(len(p.ids), p.sequence.n_cells + len(p.ids)) for p in pieces]
        return BatchShape(
            n_tokens=sum(len(piece.ids) for piece in pieces),
            n_outputs=sum(piece.outputs for piece in pieces),
            n_spans=len(pieces),
            contraction=self._contraction(seen),
            n_candidates=n_candidates,
        )

    def _inputs(
        self, pieces: Sequence[Piece], shape: BatchShape
    ) -> dict[str, npt.NDArray[np.int32]]:
        ids, positions, cells = np.empty((3, shape.n_tokens), np.int32)
        rows = np.empty(shape.n_outputs, np.int32)
        spans = np.empty((shape.n_spans, SPAN_FIELDS), np.int32)
        first = first_row = 0
        for index, piece in enumerate(pieces):
            sequence, n = piece.sequence, len(piece.ids)
            end, end_row = first + n, first_row + piece.outputs
            cells[first:end] = self._cache.reserve(sequence, n)
            seen = sequence.n_cells + n
            expanded = self._expands(n, seen)
            spans[index] = (index, first, n, sequence.first_cell, seen, expanded)
            ids[first:end] = piece.ids
            positions[first:end] = np.arange(sequence.next_position, sequence.next_position + n)
            rows[first_row:end_row] = np.arange(end - piece.outputs, end)
            first, first_row = end, end_row
        inputs = {
            "ids": ids,
            "positions": positions,
            "cells": cells,
            "spans": spans,
            "block_table": self._cache.block_table[[piece.sequence.row for piece in pieces]],
        }
        if shape.n_outputs:
            inputs["rows"] = rows
        return inputs

    def _contraction(self, pieces: Sequence[tuple[int, int]]) -> str:
        """Of pieces of (new tokens, positions seen): what BatchShape says of them.

        The CPU finds out as it goes; a device runs what was laid out for it before.
        """
        if self._engine.isa != "cuda":
            return "any"
        kinds = {self._expands(*piece) for piece in pieces}
        return "any" if len(kinds) > 1 else "expanded" if True in kinds else "absorbed"

    def _expands(self, n_tokens: int, n_cells: int) -> bool:
        return expands(self._dims, self.attention, n_tokens, n_cells, self._engine.isa)

    def _executor(self, shape: BatchShape) -> _core.Executor:
        found = self._executors.get(shape)
        if found is None:
            engine = self._engine
            graph = build_graph(
                engine.config,
                engine.weights,
                self._cache.layout,
                shape,
                engine.precision,
                self._observer,
                engine.place,
            )
            found = _core.Executor(graph, engine.workspace)
            if len(self._executors) >= _MAX_GRAPHS:
                self._executors.popitem(last=False)
            self._executors[shape] = found
        self._executors.move_to_end(shape)
        return found
