"""From a shape to a GGUF file of random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ..config import Layout
from ..convert.mixes import mix_named
from ..errors import UsageError
from ..gguf.types import Value
from ..gguf.writer import Chunk, NewTensor, shard_keys, shard_path, write_gguf
from .metadata import metadata
from .shapes import ModelShape, shape_named
from .tensors import Plan, plan_tensors, split_kv_b
from .vocabulary import make_vocabulary
from .weights import WeightSource

#: Called with a phase name, the bytes done and the bytes in total.
Progress = Callable[[str, int, int], None]


def write_model(
    path: str | Path,
    shape: ModelShape | str,
    *,
    type: str = "q4_k_m",
    layout: Layout = "split",
    seed: int = 0,
    shards: int = 1,
    on_progress: Progress | None = None,
) -> list[Path]:
    """Write a random model of a shape and return the paths of its files.

    Memory use does not grow with the model. Files of one seed hold the same model in every type
    and layout, apart from rounding (a legacy file cannot tell of expert groups, though).

    Args:
        path: with several shards, ``name.gguf`` becomes ``name-00001-of-0000N.gguf`` and so on.
        shape: a shape or the name of one in ``SHAPES``.
        type: a file type as quantizers name it, one of ``MIXES``.
        layout: ``split`` for attn_k_b and attn_v_b, ``legacy`` for the joint attn_kv_b of 2024.
        on_progress: called with ``"write"``, the bytes done and the bytes in total.

    Raises:
        UsageError: an unknown shape, type or layout, or numbers that do not fit together.
        OSError: the disk is too full (found before writing) or the path cannot be written.
    """
    path = Path(path)
    if isinstance(shape, str):
        shape = shape_named(shape)
    if layout not in ("split", "legacy"):
        raise UsageError(f"layout {layout!r} is unknown; accepted are split, legacy")
    mix = mix_named(type)
    plans = plan_tensors(shape, mix, layout)
    if not 1 <= shards <= len(plans):
        raise UsageError(f"{shards} shards for {len(plans)} tensors; accepted: 1 to one each")
    keys = metadata(path.stem, shape, mix, layout, make_vocabulary(shape.vocab, shape.pre))
    return _Writer(shape, plans, seed, on_progress).write(path, keys, shards)


class _Writer:
    """One run: the plans by name, the random source and the progress so far."""

    def __init__(
        self, shape: ModelShape, plans: list[Plan], seed: int, on_progress: Progress | None
    ) -> None:
        self._shape = shape
        self._plans = {plan.name: plan for plan in plans}
        self._source = WeightSource(seed)
        self._on_progress = on_progress
        self._done = 0
        self._tensors = [NewTensor(plan.name, plan.format, plan.shape) for plan in plans]
        self._total = sum(tensor.n_bytes for tensor in self._tensors)

    def write(self, path: Path, keys: dict[str, Value], shards: int) -> list[Path]:
        paths = []
        for index, tensors in enumerate(_divide(self._tensors, shards)):
            joint = shard_keys(index, shards, len(self._tensors))
            head: dict[str, Value | np.generic] = {**(keys if index == 0 else {}), **joint}
            target = shard_path(path, index, shards)
            write_gguf(target, head, tensors, self._chunks, on_bytes=self._advance)
            paths.append(target)
        return paths

    def _chunks(self, tensor: NewTensor) -> Iterator[Chunk]:
        plan = self._plans[tensor.name]
        if not tensor.name.endswith(".attn_kv_b.weight"):
            return self._source.chunks(plan)
        block = tensor.name.removesuffix("attn_kv_b.weight")
        key, value = (
            Plan(block + part.name, part.format, part.shape, part.std)
            for part in split_kv_b(self._shape)
        )
        return self._source.joint_kv_b(plan, key, value)

    def _advance(self, n_bytes: int) -> None:
        self._done += n_bytes
        if self._on_progress is not None:
            self._on_progress("write", self._done, self._total)


def _divide(tensors: list[NewTensor], n_parts: int) -> list[list[NewTensor]]:
    """Runs of about equal size, none empty."""
    total = sum(tensor.n_bytes for tensor in tensors)
    parts: list[list[NewTensor]] = [[] for _ in range(n_parts)]
    part, passed = 0, 0
    for index, tensor in enumerate(tensors):
        must_move = len(tensors) - index == n_parts - 1 - part
        if (
            parts[part]
            and part < n_parts - 1
            and (must_move or passed * n_parts >= total * (part + 1))
        ):
            part += 1
        parts[part].append(tensor)
        passed += tensor.n_bytes
    return parts
