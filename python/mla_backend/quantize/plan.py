"""From one GGUF file to another: which tensors become what, and the bytes of each piece."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from mla_backend import _core

from ..convert.mixes import Mix, MixFacts, fallback, is_plain, mix_named, tensor_format
from ..convert.output import OutputPlan, Progress, identity_of, plan_output, write_output
from ..convert.pieces import PIECE_ELEMS, Piece, encode
from ..errors import FormatError, ModelError, UsageError
from ..formats import by_name
from ..gguf import GGUFFile, TensorInfo, Value, read_gguf
from ..gguf.data import copied_metadata, read_bytes
from ..gguf.types import QUANTIZATION_VERSION
from ..gguf.writer import NewTensor
from .columns import Guide, columns, open_guide
from .notes import notes_on
from .overrides import Override, overriding
from .step import Step

Bytes = npt.NDArray[np.uint8]

#: Bytes of a copied piece.
_COPY_BYTES: Final = 16 << 20
#: Numbers of a sample for the estimate: enough to outweigh the start.
_SAMPLE_ELEMS: Final = 1 << 19


@dataclass(frozen=True)
class QuantizePlan:
    """A quantization that was checked and can be carried out.

    Attributes:
        type: the file type.
        output: the files.
        steps: how each tensor is made, in file order.
        notes: what the user should know.
        n_threads: threads that will work.
        file: the file that is read.
    """

    type: str
    output: OutputPlan
    steps: tuple[Step, ...]
    notes: tuple[str, ...]
    n_threads: int
    file: GGUFFile

    def make(self, piece: Piece) -> Bytes:
        """The bytes of one piece.

        Raises:
            OSError: the file cannot be read.
            ModelError: its numbers cannot be written in the tensor's format.
        """
        step = self.steps[piece.tensor]
        if step.is_copy:
            return read_bytes(self.file, step.source, piece.first, piece.count)
        return _encoded(self.file, step, piece)

    def bits_per_weight(self) -> float:
        """Bits of all tensors by their numbers."""
        n_elems = sum(prod(tensor.shape) for tensor in self.output.tensors)
        return 8 * sum(tensor.n_bytes for tensor in self.output.tensors) / n_elems


def plan_quantization(
    path: str | Path,
    out: str | Path,
    type: str,
    *,
    imatrix: str | Path | None = None,
    overrides: Sequence[Override] = (),
    allow_requantize: bool = False,
    max_shard_bytes: int | None = None,
    threads: int | None = None,
) -> QuantizePlan:
    """Check a file and lay out what it becomes. Nothing is written.

    Args:
        path: a GGUF file; of a split one, any part.
        out: the file to write.
        type: a file type of ``convert.mixes``.
        imatrix: file that tells how much columns count.
        overrides: formats for matrices by name; the first that matches one counts.
        allow_requantize: also take numbers that were quantized before.
        max_shard_bytes: where to split the file; None writes one.
        threads: None takes one per core.

    Raises:
        ModelError: a file is damaged, or the guide is of another model.
        UsageError: the type is unknown or needs importance, or numbers would be quantized a second
            time without being asked to.
    """
    mix = mix_named(type)
    file = read_gguf(path)
    guide = open_guide(imatrix) if imatrix is not None else None
    if mix.needs_importance and guide is None:
        raise UsageError(f"type {type} is useless without importance; --imatrix gives it")
    facts = _facts(file, guide is not None)
    steps = tuple(_step(info, mix, facts, overrides, guide) for info in file.tensors.values())
    _check(file, steps, guide, allow_requantize)
    pieces = [piece for index, step in enumerate(steps) for piece in _cut(step, index)]
    output = plan_output(
        Path(out),
        _metadata(file, mix, guide),
        [step.target for step in steps],
        pieces,
        identity_of([*file.paths, *([guide.path] if guide else [])]),
        max_shard_bytes,
    )
    if any(p.resolve() in {own.resolve() for own in file.paths} for p in output.paths):
        raise UsageError(f"{out}: the new file cannot replace the old one while it is read")
    return QuantizePlan(
        type=type.lower(),
        output=output,
        steps=steps,
        notes=tuple(notes_on(steps, overrides, has_importance=guide is not None)),
        n_threads=threads or _core.usable_physical_cores(),
        file=file,
    )


def quantize_file(
    path: str | Path,
    out: str | Path,
    type: str,
    *,
    imatrix: str | Path | None = None,
    overrides: Sequence[Override] = (),
    allow_requantize: bool = False,
    max_shard_bytes: int | None = None,
    threads: int | None = None,
    on_progress: Progress | None = None,
) -> QuantizePlan:
    """Quantize a file. Arguments and errors as in plan_quantization.

    After an interruption the same call goes on where it stopped.

    Raises:
        OSError: a disk is full (found before writing), or a file cannot be read or written.
    """
    plan = plan_quantization(
        path,
        out,
        type,
        imatrix=imatrix,
        overrides=overrides,
        allow_requantize=allow_requantize,
        max_shard_bytes=max_shard_bytes,
        threads=threads,
    )
    write_output(plan.output, plan.make, plan.n_threads, on_progress)
    return plan


def estimate_seconds(plan: QuantizePlan) -> float:
    """Seconds for all pieces, from making a sample of each kind; writing apart."""
    costs: dict[tuple[str, str], float] = {}
    seconds = 0.0
    for piece in plan.output.pieces:
        step = plan.steps[piece.tensor]
        n_elems = prod(step.target.shape) * piece.n_bytes / step.target.n_bytes
        kind = (step.source.format, step.target.format)
        if kind not in costs:
            sample = _sample(step, piece)
            started_s = time.perf_counter()
            plan.make(sample)
            spent_s = time.perf_counter() - started_s
            costs[kind] = spent_s / (n_elems * sample.count / piece.count)
        seconds += n_elems * costs[kind]
    return seconds / plan.n_threads


def _sample(step: Step, piece: Piece) -> Piece:
    """The beginning of a piece."""
    unit = 1 if step.is_copy else step.source.shape[-1]
    count = max(1, min(piece.count, _SAMPLE_ELEMS // unit))
    n_bytes = piece.n_bytes * count // piece.count
    return Piece(piece.tensor, piece.offset, n_bytes, piece.source, piece.first, count)


# ---- the plan ------------------------------------------------------------------------------------
def _facts(file: GGUFFile, has_importance: bool) -> MixFacts:
    architecture = file.metadata.get("general.architecture")

    def number(key: str, default: int) -> int:
        value = file.metadata.get(f"{architecture}.{key}")
        return value if type(value) is int else default

    n_head = number("attention.head_count", 1)
    return MixFacts(
        n_layer=number("block_count", 0),
        n_expert=number("expert_count", 0),
        n_head=n_head,
        n_head_kv=max(1, number("attention.head_count_kv", n_head)),
        tied="output.weight" not in file.tensors,
        has_importance=has_importance,
    )


def _step(
    info: TensorInfo,
    mix: Mix,
    facts: MixFacts,
    overrides: Sequence[Override],
    guide: Guide | None,
) -> Step:
    if is_plain(info.name, info.shape):
        return Step(NewTensor(info.name, info.format, info.shape), info)
    format = tensor_format(mix, info.name, info.shape, facts)
    chosen = overriding(overrides, info.name)
    if chosen is not None:
        format = fallback(chosen, info.shape[-1])
    inputs = guide.of(info.name, info.shape) if guide is not None else None
    return Step(NewTensor(info.name, format, info.shape), info, inputs)


def _check(
    file: GGUFFile, steps: Sequence[Step], guide: Guide | None, allow_requantize: bool
) -> None:
    again = [s for s in steps if by_name(s.source.format).quantized and not s.is_copy]
    if again and not allow_requantize:
        first = again[0]
        raise UsageError(
            f"{file.paths[0]}: {len(again)} tensors are quantized already, as {first.source.name} "
            f"in {first.source.format}; what was lost then is not found again, so a file of 16 or "
            "32 bits is accepted, or any with --allow-requantize"
        )
    if guide is not None and not any(step.inputs is not None for step in steps):
        first_known = next(iter(guide.importance.weights), "nothing")
        raise ModelError(
            f"{guide.path}: knows none of the weights of {file.paths[0]}, but {first_known!r}"
        )


def _metadata(file: GGUFFile, mix: Mix, guide: Guide | None) -> dict[str, Value | np.generic]:
    """The old keys in their order, then what tells of the quantization."""
    changes: dict[str, Value | np.generic] = {
        "general.quantization_version": QUANTIZATION_VERSION,
        "general.file_type": mix.file_type,
    }
    if guide is not None:
        changes |= {
            "quantize.imatrix.file": str(guide.path),
            "quantize.imatrix.dataset": next(iter(guide.importance.datasets), ""),
            "quantize.imatrix.entries_count": len(guide.importance.weights),
            "quantize.imatrix.chunks_count": guide.importance.n_chunks,
        }
    kept = {key: value for key, value in copied_metadata(file).items() if key not in changes}
    return kept | changes


# ---- pieces --------------------------------------------------------------------------------------
def _cut(step: Step, tensor: int) -> Iterator[Piece]:
    """Runs of bytes to be copied, or of rows of one matrix to be encoded, in order."""
    if step.is_copy:
        for first in range(0, step.target.n_bytes, _COPY_BYTES):
            count = min(_COPY_BYTES, step.target.n_bytes - first)
            yield Piece(tensor, first, count, 0, first, count)
        return
    shape = step.source.shape
    row_bytes = by_name(step.target.format).n_bytes((shape[-1],))
    per_piece = max(1, PIECE_ELEMS // shape[-1])
    offset = 0
    for matrix in range(prod(shape[:-2])):
        for first in range(0, step.rows, per_piece):
            count = min(per_piece, step.rows - first)
            yield Piece(tensor, offset, count * row_bytes, matrix, first, count)
            offset += count * row_bytes


def _encoded(file: GGUFFile, step: Step, piece: Piece) -> Bytes:
    source, target = step.source, step.target
    n_columns = source.shape[-1]
    row_bytes = by_name(source.format).n_bytes((n_columns,))
    first = (piece.source * step.rows + piece.first) * row_bytes
    data = read_bytes(file, source, first, piece.count * row_bytes).reshape(-1, row_bytes)
    if target.format == "F16":  # which cannot hold all that the others can: checked there
        wide = _core.dequantize(data, source.format, n_columns, threads=1)
        return encode(wide, target).reshape(-1)
    weights = columns(step.inputs, piece.source, n_columns) if step.inputs is not None else None
    try:
        rows: Bytes = _core.requantize(
            data, source.format, n_columns, target.format, weights, threads=1
        )
    except FormatError as error:
        raise ModelError(f"tensor {target.name!r}: {error}") from error
    return rows.reshape(-1)
