"""Rewrites a split file of floats into the legacy layout, with the `gguf` package alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

_PREFIX = "deepseek2."
_OF_SPLIT_FILES = ("attention.key_length_mla", "attention.value_length_mla")


def write_legacy(source: Path, target: Path) -> None:
    """Join attn_k_b [H, C, N] and attn_v_b [H, V, C] of each layer into attn_kv_b [H * (N + V), C].

    Only the keys that describe these tensors change. The weights must be F32, F16 or BF16.
    """
    reader = GGUFReader(source)
    writer = GGUFWriter(target, "deepseek2")
    heads = int(reader.fields[f"{_PREFIX}attention.head_count"].contents())
    changed = {
        "attention.head_count_kv": heads,
        "attention.key_length": reader.fields[f"{_PREFIX}{_OF_SPLIT_FILES[0]}"].contents(),
        "attention.value_length": reader.fields[f"{_PREFIX}{_OF_SPLIT_FILES[1]}"].contents(),
    }
    _copy_keys(reader, writer, changed)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, tensor in tensors.items():
        kind = tensor.tensor_type
        if name.endswith(".attn_k_b.weight"):
            value = tensors[name.replace("attn_k_b", "attn_v_b")].data
            rows = _joined(tensor.data, value, 2 if kind == GGMLQuantizationType.BF16 else 1)
            name = name.replace("attn_k_b", "attn_kv_b")
            writer.add_tensor(name, rows, raw_dtype=kind)
        elif not name.endswith(".attn_v_b.weight"):
            writer.add_tensor(name, tensor.data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _joined(key: np.ndarray, value: np.ndarray, bytes_each: int) -> np.ndarray:
    """[H, C, N] and [H, V, C] -> [H * (N + V), C]; BF16 comes as bytes."""
    if bytes_each == 2:
        key, value = key.view(np.uint16), value.view(np.uint16)
    rows = np.concatenate([key.swapaxes(1, 2), value], axis=1)
    flat = np.ascontiguousarray(rows.reshape(-1, rows.shape[-1]))
    return flat.view(np.uint8) if bytes_each == 2 else flat


def _copy_keys(reader: GGUFReader, writer: GGUFWriter, changed: dict[str, int]) -> None:
    skipped = {_PREFIX + key for key in _OF_SPLIT_FILES} | {"general.architecture"}
    for name, field in reader.fields.items():
        if name in skipped or name.startswith("GGUF."):
            continue
        short = name.removeprefix(_PREFIX)
        value = changed[short] if short in changed else field.contents()
        inner = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], inner)
