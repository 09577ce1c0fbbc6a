"""The network as a checkpoint in the released layout: safetensors shards and config.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from demo_model.network import Network
from demo_model.shape import Shape
from demo_model.tokens import BOS, EOS, PAD

_SHARD_BYTES = 15 << 20
_STACKED = ("gate_proj", "up_proj", "down_proj")


def save(model: Network, tokenizer: Path, folder: Path) -> None:
    """Write the checkpoint: bf16, but for the routers' biases (float32)."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in _released(model):
        if filled + tensor.nbytes > _SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):06}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    n_bytes = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": n_bytes}, "weight_map": weight_map}
    _write(folder / "model.safetensors.index.json", index)
    _write(folder / "config.json", model.shape.hf_config())
    _write(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    _write(folder / "tokenizer_config.json", _tokenizer_config(model.shape))
    shutil.copyfile(tokenizer, folder / "tokenizer.json")


def load(folder: Path, shape: Shape) -> Network:
    """The network of a checkpoint that :func:`save` wrote, in float32, ready to evaluate."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    released: dict[str, Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        released |= load_file(folder / file)
    model = Network(shape)
    state = model.state_dict()
    for name, target in state.items():
        parts = [released[part].float() for part in _parts(name, target)]
        state[name] = parts[0] if len(parts) == 1 else torch.stack(parts)
    model.load_state_dict(state)
    return model.eval()


def _released(model: Network) -> Iterator[tuple[str, Tensor]]:
    for name, weight in model.state_dict().items():
        parts = _parts(name, weight)
        pieces = weight.unbind() if len(parts) > 1 else (weight,)
        exact = name.endswith("bias")
        for part, piece in zip(parts, pieces, strict=True):
            yield part, piece.to("cpu", torch.float32 if exact else torch.bfloat16).contiguous()
    last = f"model.layers.{model.shape.n_layer}"
    # The release stores the prediction layer's copies of both matrices; they are the same.
    for copy, weight in (
        ("embed_tokens", model.embed_tokens.weight),
        ("shared_head.head", model.lm_head.weight),
    ):
        yield f"{last}.{copy}.weight", weight.detach().to("cpu", torch.bfloat16).clone()


def _parts(name: str, weight: Tensor) -> list[str]:
    """The released names of a parameter: one, or one per expert, the shared one last."""
    full = name if name.startswith("lm_head") else f"model.{name}"
    stem, _, last = full.rpartition(".")
    if last not in _STACKED:
        return [full]
    routed = [f"{stem}.experts.{i}.{last}.weight" for i in range(len(weight) - 1)]
    return [*routed, f"{stem}.shared_experts.{last}.weight"]


def _tokenizer_config(shape: Shape) -> dict[str, Any]:
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": _added(BOS),
        "clean_up_tokenization_spaces": False,
        "eos_token": _added(EOS),
        "legacy": True,
        "model_max_length": shape.context,
        "pad_token": _added(PAD),
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizerFast",
        "unk_token": None,
    }


def _added(content: str) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, **flags}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
