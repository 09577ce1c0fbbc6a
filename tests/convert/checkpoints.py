"""Small random checkpoints in the form of the hub, and what a file made of them must hold.

Nothing of the package takes part: names, transforms and the container are written out once more.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

D, HEADS, NOPE, ROPE, VALUE, LATENT, RANK = 192, 2, 32, 16, 64, 160, 96
FF, FF_EXPERT, EXPERTS, USED, SHARED, LAYERS, DENSE, VOCAB = 224, 96, 4, 2, 1, 3, 1, 320

_DTYPES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
    np.dtype(np.int32): "I32",
}

V3_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": D,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
    "kv_lora_rank": LATENT,
    "q_lora_rank": RANK,
    "intermediate_size": FF,
    "moe_intermediate_size": FF_EXPERT,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": USED,
    "n_shared_experts": SHARED,
    "n_group": 2,
    "topk_group": 1,
    "num_hidden_layers": LAYERS,
    "first_k_dense_replace": DENSE,
    "moe_layer_freq": 1,
    "max_position_embeddings": 4096,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-6,
    "rope_theta": 50000,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "bos_token_id": 300,
    "eos_token_id": 301,
}
V2_CONFIG = {
    **V3_CONFIG,
    "architectures": ["DeepseekV2ForCausalLM"],
    "q_lora_rank": None,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
}
DENSE_CONFIG = {
    key: value
    for key, value in V3_CONFIG.items()
    if key not in ("n_routed_experts", "moe_intermediate_size", "n_shared_experts", "n_group")
} | {"tie_word_embeddings": True}


@dataclass
class Checkpoint:
    """A checkpoint in memory; change it, then write it."""

    config: dict[str, Any]
    tensors: dict[str, Array] = field(default_factory=dict)
    tokenizer: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path, n_shards: int = 2) -> Path:
        """Write all files; tensors go to the shards in turn."""
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(self.config))
        (path / "tokenizer_config.json").write_text(json.dumps(self.settings))
        if self.tokenizer is not None:
            (path / "tokenizer.json").write_text(json.dumps(self.tokenizer))
        where: dict[str, str] = {}
        for shard in range(n_shards):
            name = f"model-{shard + 1:05d}-of-{n_shards:06d}.safetensors"
            part = dict(list(self.tensors.items())[shard::n_shards])
            write_safetensors(path / name, part)
            where |= dict.fromkeys(part, name)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        return path


def write_safetensors(path: Path, tensors: dict[str, Array]) -> None:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        entries[name] = {
            "dtype": _DTYPES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def checkpoint(
    config: dict[str, Any] | None = None,
    *,
    dtype: Any = ml_dtypes.bfloat16,
    n_nextn: int = 0,
    fp8: bool = False,
    seed: int = 0,
) -> Checkpoint:
    """A random checkpoint; with ``fp8`` its matrices have 8 bits and scales beside them."""
    config = dict(V3_CONFIG if config is None else config)
    if n_nextn:
        config["num_nextn_predict_layers"] = n_nextn
    random = np.random.default_rng(seed)
    tensors: dict[str, Array] = {}
    for name, shape in shapes(config, n_nextn).items():
        values = random.standard_normal(shape, dtype=np.float32) * 0.1
        is_matrix = name.endswith("_proj.weight") or name.endswith("proj_with_mqa.weight")
        if fp8 and is_matrix:
            blocks = (-(-shape[0] // 128), -(-shape[1] // 128))
            scales = random.uniform(1e-4, 3e-4, blocks).astype(np.float32)
            tensors[name] = np.clip(values * 1000, -448, 448).astype(ml_dtypes.float8_e4m3fn)
            tensors[name + "_scale_inv"] = scales
        elif name.endswith("correction_bias"):
            tensors[name] = values
        else:
            tensors[name] = values.astype(dtype)
    return Checkpoint(config, tensors, tokenizer_json(), settings())


def shapes(config: dict[str, Any], n_nextn: int = 0) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, D)}
    for layer in range(LAYERS + n_nextn):
        block = _layer_shapes(config, layer)
        if layer >= LAYERS:
            block |= {
                "embed_tokens.weight": (VOCAB, D),
                "enorm.weight": (D,),
                "hnorm.weight": (D,),
                "eh_proj.weight": (D, 2 * D),
                "shared_head.norm.weight": (D,),
                "shared_head.head.weight": (VOCAB, D),
            }
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    found["model.norm.weight"] = (D,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (VOCAB, D)
    return found


def _layer_shapes(config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    key = NOPE + ROPE
    found: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (D,),
        "self_attn.kv_a_proj_with_mqa.weight": (LATENT + ROPE, D),
        "self_attn.kv_a_layernorm.weight": (LATENT,),
        "self_attn.kv_b_proj.weight": (HEADS * (NOPE + VALUE), LATENT),
        "self_attn.o_proj.weight": (D, HEADS * VALUE),
        "post_attention_layernorm.weight": (D,),
    }
    if config["q_lora_rank"] is None:
        found["self_attn.q_proj.weight"] = (HEADS * key, D)
    else:
        found["self_attn.q_a_proj.weight"] = (RANK, D)
        found["self_attn.q_a_layernorm.weight"] = (RANK,)
        found["self_attn.q_b_proj.weight"] = (HEADS * key, RANK)
    if layer < DENSE or "n_routed_experts" not in config:
        return found | _swiglu_shapes("mlp", FF)
    found["mlp.gate.weight"] = (EXPERTS, D)
    if config["topk_method"] == "noaux_tc":
        found["mlp.gate.e_score_correction_bias"] = (EXPERTS,)
    for expert in range(EXPERTS):
        found |= _swiglu_shapes(f"mlp.experts.{expert}", FF_EXPERT)
    return found | _swiglu_shapes("mlp.shared_experts", SHARED * FF_EXPERT)


def _swiglu_shapes(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (width, D),
        f"{prefix}.up_proj.weight": (width, D),
        f"{prefix}.down_proj.weight": (D, width),
    }


def numbers(made: Checkpoint, name: str) -> npt.NDArray[np.float32]:
    """A tensor as float32, fp8 times its scales element by element."""
    values = made.tensors[name].astype(np.float32)
    scales = made.tensors.get(name + "_scale_inv")
    if scales is not None:
        rows, columns = np.indices(values.shape)
        values = values * scales[rows // 128, columns // 128]
    return values


def expected(made: Checkpoint, layer: int) -> dict[str, npt.NDArray[np.float32]]:
    """Tensors of one layer of the file that are not copies, by their names in the file."""
    source, block = f"model.layers.{layer}.", f"blk.{layer}."
    joint = numbers(made, f"{source}self_attn.kv_b_proj.weight")
    found: dict[str, npt.NDArray[np.float32]] = {}
    k_b = np.empty((HEADS, LATENT, NOPE), np.float32)
    v_b = np.empty((HEADS, VALUE, LATENT), np.float32)
    for head in range(HEADS):
        rows = joint[head * (NOPE + VALUE) : (head + 1) * (NOPE + VALUE)]
        k_b[head] = rows[:NOPE].T
        v_b[head] = rows[NOPE:]
    found[f"{block}attn_k_b.weight"], found[f"{block}attn_v_b.weight"] = k_b, v_b
    if f"{source}mlp.experts.0.up_proj.weight" in made.tensors:
        for kind in ("gate", "up", "down"):
            found[f"{block}ffn_{kind}_exps.weight"] = np.stack(
                [
                    numbers(made, f"{source}mlp.experts.{expert}.{kind}_proj.weight")
                    for expert in range(EXPERTS)
                ]
            )
    return found


def byte_characters() -> list[str]:
    """The alphabet of byte-level BPE in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


DEEPSEEK_V3_SPLITS = [
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
    " ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
]


def pre_tokenizer(regexes: list[str]) -> dict[str, Any]:
    """Steps of a tokenizer.json that split by expressions."""
    splits = [
        {"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": False}
        for r in regexes
    ]
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {"type": "Sequence", "pretokenizers": [*splits, last | {"use_regex": False}]}


def tokenizer_json() -> dict[str, Any]:
    """256 bytes, a few merges, and added tokens of three kinds."""
    merges = ["t h", "th e", "i n", "Ġ the"]
    tokens = [*byte_characters(), *(merge.replace(" ", "") for merge in merges)]
    added = [(300, "<｜bos｜>", True), (301, "<eos>", True), (302, "<think>", False)]
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, "special": special, "normalized": False}
            for i, text, special in added
        ],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer(DEEPSEEK_V3_SPLITS),
        "post_processor": None,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def settings() -> dict[str, Any]:
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": {"content": "<｜bos｜>"},
        "eos_token": "<eos>",
        "chat_template": "{{ messages }}",
    }
