"""GGUF bytes from plain dictionaries, with any field made wrong on purpose.

Written from the format's description and apart from the package's reader, which it tests.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_PACK = {
    U8: "<B", I8: "<b", U16: "<H", I16: "<h", U32: "<I", I32: "<i", F32: "<f", BOOL: "<B",
    U64: "<Q", I64: "<q", F64: "<d",
}  # fmt: skip
#: Tensor type id -> elements and bytes per block, of the types that tests write.
BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 12: (256, 144), 26: (1, 4), 30: (1, 2)}


@dataclass(frozen=True)
class Typed:
    """A metadata value with an explicit type id; ``item_type`` makes it an array."""

    type_id: int
    value: Any
    item_type: int | None = None


@dataclass(frozen=True)
class Tensor:
    """One tensor: shape outermost first; data defaults to zeros, offset to the next free place."""

    shape: Sequence[int]
    type_id: int = 0
    data: bytes | None = None
    offset: int | None = None

    @property
    def n_bytes(self) -> int:
        elems, size = BLOCKS.get(self.type_id, (1, 4))
        return prod(self.shape) // elems * size


@dataclass(frozen=True)
class File:
    """What :func:`build` writes. Lists of pairs in place of mappings allow duplicates."""

    metadata: Mapping[str, Any] | Sequence[tuple[str | bytes, Any]] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] | Sequence[tuple[str | bytes, Tensor]] = field(
        default_factory=dict
    )
    magic: bytes = b"GGUF"
    version: int = 3
    alignment: int = 32
    n_tensors: int | None = None
    n_keys: int | None = None


def array(values: Any, dtype: str) -> bytes:
    """Numbers as little-endian bytes of a NumPy type, for ``Tensor.data``."""
    return np.asarray(values, dtype).tobytes()


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(item: Any) -> bytes:
    """Type id and value. Plain Python values get the types that converters give them."""
    if isinstance(item, Typed):
        if item.item_type is None:
            return struct.pack("<I", item.type_id) + _payload(item.type_id, item.value)
        head = struct.pack("<IIQ", ARRAY, item.item_type, len(item.value))
        return head + b"".join(_payload(item.item_type, one) for one in item.value)
    if isinstance(item, bool):
        return value(Typed(BOOL, item))
    if isinstance(item, int):
        return value(Typed(U32, item))
    if isinstance(item, float):
        return value(Typed(F32, item))
    if isinstance(item, (str, bytes)):
        return value(Typed(STRING, item))
    kind = STRING if item and isinstance(item[0], (str, bytes)) else I32
    return value(Typed(ARRAY, item, kind))


def _payload(type_id: int, item: Any) -> bytes:
    if type_id == STRING:
        return string(item)
    return struct.pack(_PACK[type_id], item)


def _pairs(items: Any) -> list[tuple[Any, Any]]:
    return list(items.items()) if isinstance(items, Mapping) else list(items)


def build(file: File) -> bytes:
    """The bytes of ``file``, every tensor's data padded to the alignment."""
    keys, tensors = _pairs(file.metadata), _pairs(file.tensors)
    n_tensors = len(tensors) if file.n_tensors is None else file.n_tensors
    n_keys = len(keys) if file.n_keys is None else file.n_keys
    out = bytearray(file.magic + struct.pack("<IQQ", file.version, n_tensors, n_keys))
    for key, item in keys:
        out += string(key) + value(item)
    data = bytearray()
    for name, tensor in tensors:
        offset = len(data) if tensor.offset is None else tensor.offset
        out += string(name) + struct.pack("<I", len(tensor.shape))
        out += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        out += struct.pack("<IQ", tensor.type_id, offset)
        data += bytes(tensor.n_bytes) if tensor.data is None else tensor.data
        data += bytes(-len(data) % file.alignment)
    out += bytes(-len(out) % file.alignment)
    return bytes(out + data)


def tiny_model(layout: str = "split", *, sigmoid: bool = False, n_layer: int = 2) -> File:
    """A deepseek2 file of a few kilobytes with zero weights: 1 dense layer, then MoE layers.

    D 32, 2 heads of N 32, R 4, V 32, C 32, 8 experts of width 32, 2 used, 1 shared, vocabulary 24.
    ``sigmoid`` is the younger family: query latent 32, selection bias, 4 groups of which 2 count.
    """
    metadata: dict[str, Any] = {
        "general.architecture": "deepseek2",
        "deepseek2.block_count": n_layer,
        "deepseek2.context_length": 512,
        "deepseek2.embedding_length": 32,
        "deepseek2.feed_forward_length": 64,
        "deepseek2.attention.head_count": 2,
        "deepseek2.attention.head_count_kv": 1 if layout == "split" else 2,
        "deepseek2.attention.layer_norm_rms_epsilon": 1e-6,
        "deepseek2.attention.kv_lora_rank": 32,
        "deepseek2.attention.key_length": 36,
        "deepseek2.attention.value_length": 32,
        "deepseek2.rope.dimension_count": 4,
        "deepseek2.rope.freq_base": 10000.0,
        "deepseek2.rope.scaling.type": "yarn",
        "deepseek2.rope.scaling.factor": 4.0,
        "deepseek2.rope.scaling.original_context_length": 128,
        "deepseek2.rope.scaling.yarn_log_multiplier": 0.1,
        "deepseek2.leading_dense_block_count": 1,
        "deepseek2.expert_count": 8,
        "deepseek2.expert_used_count": 2,
        "deepseek2.expert_shared_count": 1,
        "deepseek2.expert_feed_forward_length": 32,
        "deepseek2.expert_weights_scale": 1.0,
        "deepseek2.vocab_size": 24,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"t{index}" for index in range(24)],
        "tokenizer.ggml.token_type": [1] * 24,
    }
    if layout == "split":
        metadata |= {
            "deepseek2.attention.key_length_mla": 36,
            "deepseek2.attention.value_length_mla": 32,
        }
    if sigmoid:
        metadata |= {
            "deepseek2.attention.q_lora_rank": 32,
            "deepseek2.expert_gating_func": 2,
            "deepseek2.expert_group_count": 4,
            "deepseek2.expert_group_used_count": 2,
            "deepseek2.expert_weights_norm": True,
            "deepseek2.expert_weights_scale": 2.5,
        }
    tensors = {
        "token_embd.weight": Tensor((24, 32), 8),
        "output_norm.weight": Tensor((32,)),
        "output.weight": Tensor((24, 32), 8),
    }
    for layer in range(n_layer):
        tensors |= {
            f"blk.{layer}.{name}": tensor
            for name, tensor in _tiny_layer(layout, sigmoid, dense=layer == 0).items()
        }
    return File(metadata, tensors)


def _tiny_layer(layout: str, sigmoid: bool, dense: bool) -> dict[str, Tensor]:
    tensors = {
        "attn_norm.weight": Tensor((32,)),
        "attn_kv_a_mqa.weight": Tensor((36, 32), 8),
        "attn_kv_a_norm.weight": Tensor((32,)),
        "attn_output.weight": Tensor((32, 64), 8),
        "ffn_norm.weight": Tensor((32,)),
    }
    if layout == "split":
        tensors["attn_k_b.weight"] = Tensor((2, 32, 32), 8)
        tensors["attn_v_b.weight"] = Tensor((2, 32, 32), 8)
    else:
        tensors["attn_kv_b.weight"] = Tensor((128, 32), 8)
    if sigmoid:
        tensors["attn_q_a.weight"] = Tensor((32, 32), 8)
        tensors["attn_q_a_norm.weight"] = Tensor((32,))
        tensors["attn_q_b.weight"] = Tensor((72, 32), 8)
    else:
        tensors["attn_q.weight"] = Tensor((72, 32), 8)
    if dense:
        return tensors | {
            "ffn_gate.weight": Tensor((64, 32), 8),
            "ffn_up.weight": Tensor((64, 32), 8),
            "ffn_down.weight": Tensor((32, 64), 8),
        }
    if sigmoid:
        tensors["exp_probs_b.bias"] = Tensor((8,))
    return tensors | {
        "ffn_gate_inp.weight": Tensor((8, 32)),
        "ffn_gate_exps.weight": Tensor((8, 32, 32), 8),
        "ffn_up_exps.weight": Tensor((8, 32, 32), 8),
        "ffn_down_exps.weight": Tensor((8, 32, 32), 8),
        "ffn_gate_shexp.weight": Tensor((32, 32), 8),
        "ffn_up_shexp.weight": Tensor((32, 32), 8),
        "ffn_down_shexp.weight": Tensor((32, 32), 8),
    }


def changed(
    file: File,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor | None] | None = None,
) -> File:
    """``file`` with keys and tensors replaced or added, or, where None is given, left out.

    Keys without a dot before their name's first part get the architecture's prefix.
    """
    keys = dict(_pairs(file.metadata)) | {
        key if key.split(".")[0] in ("general", "tokenizer", "split") else f"deepseek2.{key}": item
        for key, item in (metadata or {}).items()
    }
    infos = dict(_pairs(file.tensors)) | dict(tensors or {})
    return replace(
        file,
        metadata={key: item for key, item in keys.items() if item is not None},
        tensors={name: tensor for name, tensor in infos.items() if tensor is not None},
    )
