"""The metadata keys of a converted checkpoint, tokenizer apart, as the usual converter writes them.

Deliberate differences:
- ``expert_gating_func``, ``expert_weights_scale`` and ``expert_weights_norm`` are written with the
  architecture's defaults where config.json leaves them out: readers guess differently.
- ``expert_group_count`` is 1 where the selection method ignores groups, and written at all.
- dense models have the two keys of experts that readers demand, and none of the others.
- the name of a checkpoint in a hub's cache is the model's, not the commit's.
- ``block_count`` includes the prediction layers that the file holds, with ``nextn_predict_layers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..config import GATING_CODES, Layout
from ..config_keys import ARCHITECTURE
from ..gguf import Value
from ..gguf.types import QUANTIZATION_VERSION
from .checkpoint import read_json
from .hf_config import HfConfig
from .mixes import Mix
from .model_card import card_keys
from .names import Target
from .naming import ModelName, name_of_directory, parse_name, size_label

#: Recommended sampling of generation_config.json -> key and type.
_SAMPLING: Final[Mapping[str, tuple[str, type]]] = {
    "top_k": ("top_k", np.int32),
    "top_p": ("top_p", np.float32),
    "min_p": ("min_p", np.float32),
    "temperature": ("temp", np.float32),
    "penalty_last_n": ("penalty_last_n", np.int32),
    "penalty_repeat": ("penalty_repeat", np.float32),
}
Entries = dict[str, Value | np.generic]


def metadata(
    path: Path,
    raw: Mapping[str, Any],
    config: HfConfig,
    targets: list[Target],
    mix: Mix,
    layout: Layout,
    n_nextn: int,
    name: str | None,
) -> Entries:
    """All keys but the tokenizer's, in file order.

    Args:
        path: the checkpoint's directory.
        raw: its ``config.json``.
        config: what that says.
        targets: the tensors of the file.
        mix: the file type.
        layout: of the tensors.
        n_nextn: prediction layers in the file.
        name: the model's name; None takes it from the checkpoint.
    """
    model = _common(config, n_nextn) | _attention(config, layout) | _rope(config)
    model |= _experts(config) | _counts(config)
    keys = _general(path, raw, targets, name)
    keys |= {f"{ARCHITECTURE}.{key}": value for key, value in model.items()}
    keys["general.file_type"] = mix.file_type
    keys["general.quantization_version"] = QUANTIZATION_VERSION
    return keys


def _general(
    path: Path, raw: Mapping[str, Any], targets: list[Target], name: str | None
) -> Entries:
    shapes = {target.name: target.shape for target in targets}
    n_params = sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
    parsed = _name(path, raw, n_params)
    keys: Entries = {"general.architecture": ARCHITECTURE, "general.type": "model"}
    keys |= _sampling(path)
    keys["general.name"] = name or parsed.title
    for key in ("version", "organization", "finetune", "basename"):
        value = getattr(parsed, key)
        if value is not None:
            keys[f"general.{key}"] = value
    keys["general.size_label"] = parsed.size_label or size_label(shapes)
    return keys | card_keys(path, n_params)


def _name(path: Path, raw: Mapping[str, Any], n_params: int) -> ModelName:
    stated = raw.get("_name_or_path")
    if isinstance(stated, str) and stated and stated.count("/") <= 1 and stated[0] not in "./":
        return parse_name(stated, n_params)
    return parse_name(name_of_directory(path), n_params)


def _sampling(path: Path) -> Entries:
    """The recommended sampling. A file that cannot be read recommends nothing."""
    stated = read_json(path / "generation_config.json", [], required=False) or {}
    return {
        f"general.sampling.{key}": kind(stated[name])
        for name, (key, kind) in _SAMPLING.items()
        if type(stated.get(name)) in (int, float)
    }


def _common(config: HfConfig, n_nextn: int) -> Entries:
    keys: Entries = {
        "block_count": config.n_layer + n_nextn,
        "context_length": config.n_ctx_train,
        "embedding_length": config.d_model,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.n_head,
    }
    if n_nextn:
        keys["nextn_predict_layers"] = n_nextn
    return keys


def _attention(config: HfConfig, layout: Layout) -> Entries:
    keys: Entries = {
        "attention.head_count_kv": config.n_head if layout == "legacy" else 1,
        "attention.layer_norm_rms_epsilon": config.rms_eps,
        "attention.kv_lora_rank": config.kv_lora_rank,
    }
    if config.q_lora_rank is not None:
        keys["attention.q_lora_rank"] = config.q_lora_rank
    if layout == "legacy":
        keys["attention.key_length"] = config.d_key
        keys["attention.value_length"] = config.d_value
    else:
        keys |= split_lengths(config.kv_lora_rank, config.d_nope, config.d_rope, config.d_value)
    return keys


def split_lengths(kv_lora_rank: int, d_nope: int, d_rope: int, d_value: int) -> dict[str, int]:
    """The lengths of keys and values as files of the split layout have them."""
    return {
        "attention.key_length": kv_lora_rank + d_rope,
        "attention.value_length": kv_lora_rank,
        "attention.key_length_mla": d_nope + d_rope,
        "attention.value_length_mla": d_value,
    }


def _rope(config: HfConfig) -> Entries:
    rope = config.rope
    keys: Entries = {"rope.dimension_count": config.d_rope, "rope.freq_base": rope.theta}
    if rope.scaling == "none":
        return keys
    keys |= {"rope.scaling.type": rope.scaling, "rope.scaling.factor": rope.factor}
    if rope.scaling == "linear":
        return keys
    keys["rope.scaling.original_context_length"] = rope.original_context
    optional = {
        "yarn_beta_fast": rope.beta_fast,
        "yarn_beta_slow": rope.beta_slow,
        "yarn_log_multiplier": None if rope.mscale_all_dim is None else 0.1 * rope.mscale_all_dim,
    }
    return keys | {f"rope.scaling.{k}": v for k, v in optional.items() if v is not None}


def _experts(config: HfConfig) -> Entries:
    moe = config.moe
    if moe is None:  # dense models carry the two keys that readers demand of every file
        return {"expert_feed_forward_length": config.d_ff, "expert_shared_count": 0}
    keys: Entries = {
        "expert_count": moe.n_expert,
        "expert_used_count": moe.n_expert_used,
        "expert_group_count": moe.n_group,
        "expert_group_used_count": moe.n_group_used,
        "expert_gating_func": GATING_CODES[moe.gating],
        "expert_feed_forward_length": moe.d_ff,
        "expert_shared_count": moe.n_expert_shared,
        "expert_weights_scale": moe.weights_scale,
    }
    if moe.weights_norm:
        keys["expert_weights_norm"] = True
    return keys


def _counts(config: HfConfig) -> Entries:
    return {"leading_dense_block_count": config.n_layer_dense, "vocab_size": config.n_vocab}
