"""From the legacy layout to the split one, without the checkpoint.

Legacy files hold kv_b [H*(N+V), C]. Its value rows are v_b as they are, byte for byte. Its key rows
are k_b transposed: floats move unchanged, but quantized blocks run along the other dimension, so
that k_b must be decoded and encoded anew. All other tensors are copied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from mla_backend import _core

from ..config import GATING_CODES, ModelConfig, config_from_gguf
from ..config_keys import ARCHITECTURE
from ..errors import ModelError, UsageError
from ..formats import by_name
from ..gguf import GGUFFile, TensorInfo, Value, read_gguf
from ..gguf.data import copied_metadata, read_bytes
from ..gguf.writer import NewTensor
from .metadata import split_lengths
from .mixes import fallback
from .output import OutputPlan, Progress, identity_of, plan_output, write_output
from .pieces import PIECE_ELEMS, Bytes, Piece, encode, half

_KV_B: Final = ".attn_kv_b.weight"
#: Formats that k_b may be given where it cannot stay in its own.
K_B_FORMATS: Final = ("Q8_0", "F16", "BF16", "F32")
#: Bytes of a copied piece.
_COPY_BYTES: Final = 16 << 20


@dataclass(frozen=True)
class Requantized:
    """Tensors that change their numbers: how many, from which format to which."""

    n_tensors: int
    before: str
    after: str


@dataclass(frozen=True)
class _Step:
    """How one tensor of the new file is made of one of the old file."""

    target: NewTensor
    source: TensorInfo
    kind: str  # "copy", "k_b", "v_b"


@dataclass(frozen=True)
class UpgradePlan:
    """An upgrade that was checked and can be carried out.

    Attributes:
        output: the files.
        requantized: what is not lossless; empty where everything is.
        n_split: joint tensors that are split.
        n_threads: threads that will work.
    """

    output: OutputPlan
    requantized: tuple[Requantized, ...]
    n_split: int
    n_threads: int
    file: GGUFFile
    config: ModelConfig
    steps: tuple[_Step, ...]

    def make(self, piece: Piece) -> Bytes:
        """The bytes of one piece."""
        step = self.steps[piece.tensor]
        if step.kind == "copy":
            return read_bytes(self.file, step.source, piece.first, piece.count)
        return _make_half(self, step, piece)


def plan_upgrade(
    old: str | Path,
    new: str | Path,
    *,
    k_b_format: str = "Q8_0",
    max_shard_bytes: int | None = None,
    threads: int | None = None,
) -> UpgradePlan:
    """Check a legacy file and lay out its successor. Nothing is written.

    Args:
        old: the legacy file; of a split one, any part.
        new: the file to write.
        k_b_format: what a quantized k_b is encoded to, one of ``K_B_FORMATS``.
        max_shard_bytes: where to split the file; None writes one.
        threads: None takes one per core.

    Raises:
        ModelError: the file cannot be read, is of another architecture, or its layout is not
            legacy.
        UsageError: the format is not one of those accepted, or both files are one.
    """
    if k_b_format.upper() not in K_B_FORMATS:
        raise UsageError(f"k_b type {k_b_format!r}: accepted are {', '.join(K_B_FORMATS)}")
    file = read_gguf(old)
    config = config_from_gguf(file)
    joints = [name for name in file.tensors if name.endswith(_KV_B)]
    if config.layout == "split":
        raise ModelError(f"{file.paths[0]}: its layout is the split one already: nothing to do")
    _check_shapes(file, config, joints)
    steps = list(_steps(file, config, k_b_format.upper()))
    pieces = [piece for i, step in enumerate(steps) for piece in _cut(config, step, i)]
    output = plan_output(
        Path(new),
        _metadata(file, config),
        [step.target for step in steps],
        pieces,
        identity_of(file.paths),
        max_shard_bytes,
    )
    if {path.resolve() for path in output.paths} & {path.resolve() for path in file.paths}:
        raise UsageError(f"{new}: the new file cannot replace the old one while it is read")
    return UpgradePlan(
        output=output,
        requantized=_requantized(steps),
        n_split=len(joints),
        n_threads=threads or _core.usable_physical_cores(),
        file=file,
        config=config,
        steps=tuple(steps),
    )


def upgrade(
    old: str | Path,
    new: str | Path,
    *,
    k_b_format: str = "Q8_0",
    max_shard_bytes: int | None = None,
    threads: int | None = None,
    on_progress: Progress | None = None,
) -> UpgradePlan:
    """Rewrite a legacy file in the split layout. Arguments and errors as in plan_upgrade.

    After an interruption the same call goes on where it stopped.

    Raises:
        OSError: a disk is full (found before writing), or a file cannot be read or written.
    """
    plan = plan_upgrade(
        old, new, k_b_format=k_b_format, max_shard_bytes=max_shard_bytes, threads=threads
    )
    write_output(plan.output, plan.make, plan.n_threads, on_progress)
    return plan


def _check_shapes(file: GGUFFile, config: ModelConfig, joints: list[str]) -> None:
    shape = (config.n_head * (config.d_nope + config.d_value), config.kv_lora_rank)
    wrong = [name for name in joints if file.tensors[name].shape != shape]
    if not joints or wrong:
        found = f"{wrong[0]} with shape {list(file.tensors[wrong[0]].shape)}" if wrong else "none"
        raise ModelError(
            f"{file.paths[0]}: joint expansions attn_kv_b: found {found}; accepted: {list(shape)}"
        )


def _steps(file: GGUFFile, config: ModelConfig, k_b_format: str) -> Iterator[_Step]:
    heads = config.n_head
    for name, info in file.tensors.items():
        if not name.endswith(_KV_B):
            yield _Step(NewTensor(name, info.format, info.shape), info, "copy")
            continue
        block = name.removesuffix(_KV_B)
        kept = info.format if not by_name(info.format).quantized else k_b_format
        k_b = (heads, config.kv_lora_rank, config.d_nope)
        v_b = (heads, config.d_value, config.kv_lora_rank)
        k_b_name, v_b_name = f"{block}.attn_k_b.weight", f"{block}.attn_v_b.weight"
        yield _Step(NewTensor(k_b_name, fallback(kept, config.d_nope), k_b), info, "k_b")
        yield _Step(NewTensor(v_b_name, info.format, v_b), info, "v_b")


def _requantized(steps: list[_Step]) -> tuple[Requantized, ...]:
    count = Counter(
        (step.source.format, step.target.format)
        for step in steps
        if step.kind == "k_b" and by_name(step.source.format).quantized
    )
    return tuple(Requantized(n, before, after) for (before, after), n in count.items())


def _metadata(file: GGUFFile, config: ModelConfig) -> Mapping[str, Value | np.generic]:
    """The old keys in their order, the attention's as the split layout has them."""
    lengths = split_lengths(config.kv_lora_rank, config.d_nope, config.d_rope, config.d_value)
    changes: dict[str, Value | np.generic] = {
        f"{ARCHITECTURE}.{key}": value
        for key, value in {"attention.head_count_kv": 1, **lengths}.items()
    }
    if config.moe is not None:  # old files left it to the reader to guess
        changes[f"{ARCHITECTURE}.expert_gating_func"] = GATING_CODES[config.moe.gating]
    return copied_metadata(file) | changes


def _cut(config: ModelConfig, step: _Step, tensor: int) -> Iterator[Piece]:
    n_bytes = step.target.n_bytes
    if step.kind == "copy":
        for first in range(0, n_bytes, _COPY_BYTES):
            count = min(_COPY_BYTES, n_bytes - first)
            yield Piece(tensor, first, count, 0, first, count)
        return
    head_bytes = n_bytes // config.n_head
    head_elems = (config.d_nope + config.d_value) * config.kv_lora_rank
    per_piece = max(1, PIECE_ELEMS // head_elems)
    for first in range(0, config.n_head, per_piece):
        count = min(per_piece, config.n_head - first)
        yield Piece(tensor, first * head_bytes, count * head_bytes, 0, first, count)


def _make_half(plan: UpgradePlan, step: _Step, piece: Piece) -> Bytes:
    """Heads of k_b or v_b from the joint rows."""
    config, info = plan.config, step.source
    rows = config.d_nope + config.d_value
    row_bytes = info.n_bytes // info.shape[0]
    n_rows = piece.count * rows
    first_byte = piece.first * rows * row_bytes
    data = read_bytes(plan.file, info, first_byte, n_rows * row_bytes).reshape(n_rows, row_bytes)
    by_head = data.reshape(piece.count, rows, row_bytes)
    if step.kind == "v_b":
        return np.ascontiguousarray(half(by_head, "v_b", config.d_nope)).reshape(-1)
    if step.target.format == info.format and not by_name(info.format).quantized:
        dtype = np.dtype(f"u{by_name(info.format).block_bytes}")
        bits = data.view(dtype).reshape(piece.count, rows, -1)
        moved = np.ascontiguousarray(half(bits, "k_b", config.d_nope))
        return moved.reshape(-1).view(np.uint8)
    keys = np.ascontiguousarray(by_head[:, : config.d_nope]).reshape(-1, row_bytes)
    floats = _core.dequantize(keys, info.format, config.kv_lora_rank, threads=1)
    joint = floats.reshape(piece.count, config.d_nope, config.kv_lora_rank)
    moved = np.ascontiguousarray(half(joint, "k_b", config.d_nope))
    return encode(moved.reshape(-1, config.d_nope), step.target).reshape(-1)
