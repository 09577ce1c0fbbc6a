"""Metadata keys of a random model, as converters write them today or wrote them in 2024."""

from __future__ import annotations

import numpy as np

from ..config import GATING_CODES, Layout
from ..convert.mixes import Mix
from ..gguf.types import QUANTIZATION_VERSION, Value
from .shapes import ModelShape
from .vocabulary import Vocabulary


def metadata(
    name: str, shape: ModelShape, mix: Mix, layout: Layout, vocabulary: Vocabulary
) -> dict[str, Value]:
    """All keys in file order.

    Old files have neither group keys nor the lengths of the expanded heads: a legacy file of a
    shape with groups therefore describes selection without groups.
    """
    keys: dict[str, Value] = {"general.architecture": "deepseek2", "general.name": name}
    if layout == "split":
        keys["general.type"] = "model"
    model = {**_common(shape), **_attention(shape, layout), **_experts(shape, layout)}
    model.update(_rope(shape, layout))
    keys.update({f"deepseek2.{key}": value for key, value in model.items()})
    keys.update(_tokenizer(vocabulary))
    keys["general.quantization_version"] = QUANTIZATION_VERSION
    keys["general.file_type"] = mix.file_type
    return keys


def _common(s: ModelShape) -> dict[str, Value]:
    return {
        "block_count": s.n_layer,
        "context_length": s.context,
        "embedding_length": s.d_model,
        "feed_forward_length": s.d_ff,
        "leading_dense_block_count": s.n_layer_dense,
        "vocab_size": s.vocab,
    }


def _attention(s: ModelShape, layout: Layout) -> dict[str, Value]:
    keys: dict[str, Value] = {
        "attention.head_count": s.n_head,
        "attention.layer_norm_rms_epsilon": s.rms_epsilon,
        "attention.kv_lora_rank": s.kv_lora_rank,
    }
    if s.q_lora_rank is not None:
        keys["attention.q_lora_rank"] = s.q_lora_rank
    if layout == "legacy":
        keys["attention.head_count_kv"] = s.n_head
        keys["attention.key_length"] = s.nope + s.rope
        keys["attention.value_length"] = s.value
        return keys
    keys["attention.head_count_kv"] = 1
    keys["attention.key_length"] = s.kv_lora_rank + s.rope
    keys["attention.value_length"] = s.kv_lora_rank
    keys["attention.key_length_mla"] = s.nope + s.rope
    keys["attention.value_length_mla"] = s.value
    return keys


def _experts(s: ModelShape, layout: Layout) -> dict[str, Value]:
    if s.n_expert == 0:
        # Dense models carry the two keys that readers demand of every file.
        return {"expert_feed_forward_length": s.d_ff, "expert_shared_count": 0}
    keys: dict[str, Value] = {
        "expert_count": s.n_expert,
        "expert_used_count": s.n_expert_used,
        "expert_feed_forward_length": s.d_ff_expert,
        "expert_shared_count": s.n_expert_shared,
        "expert_weights_scale": s.weights_scale,
    }
    if s.normalize:
        keys["expert_weights_norm"] = True
    if layout == "split" or s.gating == "sigmoid":
        keys["expert_gating_func"] = GATING_CODES[s.gating]
    if layout == "split":
        keys["expert_group_count"] = s.n_group
        keys["expert_group_used_count"] = s.n_group_used
    return keys


def _rope(s: ModelShape, layout: Layout) -> dict[str, Value]:
    keys: dict[str, Value] = {"rope.dimension_count": s.rope, "rope.freq_base": s.rope_base}
    if s.yarn is None:
        return keys
    keys["rope.scaling.type"] = "yarn"
    keys["rope.scaling.factor"] = s.yarn.factor
    keys["rope.scaling.original_context_length"] = s.yarn.original_context
    keys["rope.scaling.yarn_log_multiplier"] = 0.1 * s.yarn.mscale_all_dim
    if layout == "split":
        keys["rope.scaling.yarn_beta_fast"] = s.yarn.beta_fast
        keys["rope.scaling.yarn_beta_slow"] = s.yarn.beta_slow
    return keys


def _tokenizer(vocabulary: Vocabulary) -> dict[str, Value]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": vocabulary.pre,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": np.array(vocabulary.types, dtype=np.int32),
        "tokenizer.ggml.merges": vocabulary.merges,
        "tokenizer.ggml.bos_token_id": vocabulary.bos,
        "tokenizer.ggml.eos_token_id": vocabulary.eos,
        "tokenizer.ggml.padding_token_id": vocabulary.padding,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": vocabulary.chat_template,
    }
