"""The model's dimensions and what a checkpoint's config.json says about them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Dimensions of the network. Every row that the K-quants see is a multiple of 256 long.

    Attributes:
        n_layer: layers without the one for multi-token prediction.
        n_dense: leading layers without experts.
        context: longest sequence, of which the first ``context / yarn_factor`` positions are
            what the rotary frequencies were first trained for.
    """

    vocab_size: int = 4096
    hidden: int = 256
    n_layer: int = 7
    n_dense: int = 1
    n_head: int = 4
    q_latent: int = 256
    kv_latent: int = 256
    nope: int = 128
    rope: int = 64
    value: int = 128
    dense_width: int = 2048
    n_expert: int = 8
    n_active: int = 3
    expert_width: int = 256
    routed_scale: float = 2.0
    norm_epsilon: float = 1e-6
    rope_base: float = 10000.0
    context: int = 4096
    yarn_factor: float = 4.0

    @property
    def short_context(self) -> int:
        """Positions before YaRN stretches them."""
        return int(self.context / self.yarn_factor)

    def hf_config(self) -> dict[str, Any]:
        """The checkpoint's config.json."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "ep_size": 1,
            "first_k_dense_replace": self.n_dense,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.dense_width,
            "kv_lora_rank": self.kv_latent,
            "max_position_embeddings": self.context,
            "model_type": "deepseek_v3",
            "moe_intermediate_size": self.expert_width,
            "moe_layer_freq": 1,
            "n_group": 1,
            "n_routed_experts": self.n_expert,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": self.n_head,
            "num_experts_per_tok": self.n_active,
            "num_hidden_layers": self.n_layer,
            "num_key_value_heads": self.n_head,
            "num_nextn_predict_layers": 1,
            "q_lora_rank": self.q_latent,
            "qk_nope_head_dim": self.nope,
            "qk_rope_head_dim": self.rope,
            "rms_norm_eps": self.norm_epsilon,
            "rope_scaling": {
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": self.yarn_factor,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": self.short_context,
                "type": "yarn",
            },
            "rope_theta": self.rope_base,
            "routed_scaling_factor": self.routed_scale,
            "scoring_func": "sigmoid",
            "tie_word_embeddings": False,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "v_head_dim": self.value,
            "vocab_size": self.vocab_size,
        }

    def frequencies(self, yarn: bool) -> list[float]:
        """Radians per position of the ``rope / 2`` rotary pairs."""
        half = self.rope // 2
        plain = [self.rope_base ** (-i / half) for i in range(half)]
        if not yarn:
            return plain
        low = max(math.floor(self._pair_of(32)), 0)
        high = min(math.ceil(self._pair_of(1)), self.rope - 1)
        ramp = [min(max((i - low) / max(high - low, 1e-3), 0.0), 1.0) for i in range(half)]
        return [f * (1 - r + r / self.yarn_factor) for f, r in zip(plain, ramp, strict=True)]

    def softmax_scale(self, yarn: bool) -> float:
        """What scores are multiplied by."""
        stretch = 0.1 * math.log(self.yarn_factor) + 1 if yarn else 1.0
        return stretch**2 / math.sqrt(self.nope + self.rope)

    def _pair_of(self, turns: float) -> float:
        """The (fractional) pair that turns so often within the short context."""
        length = self.short_context / (turns * 2 * math.pi)
        return self.rope * math.log(length) / (2 * math.log(self.rope_base))
