"""The weights of the computed graph: declared by name and shape, then looked for in the file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from .config import ModelConfig
from .errors import ModelError
from .gguf import GGUFFile, TensorInfo

#: What a weight is for, hence which formats it may have and how it is bound.
#: embedding: rows looked up by token. linear: [out, in]. experts: [expert, out, in].
#: norm, router, router_bias: plain numbers. k_b: [head, latent, nope], v_b: [head, value, latent],
#: the two halves of kv_b: [head * (nope + value), latent].
Role = Literal[
    "embedding", "linear", "experts", "norm", "router", "router_bias", "k_b", "v_b", "kv_b"
]

_PLAIN_ROLES: Final = ("norm", "router", "router_bias")
_PLAIN_FORMATS: Final = ("F32", "F16", "BF16")
# A format for ids and positions, which the table has and no weight may use.
_INTEGER_FORMAT: Final = "I32"
# Longer lists in an error are folded to one line per kind of weight.
_LISTED = 40

#: Tensors that may lie beside the declared ones without changing anything: precomputed inverse
#: frequencies of old converters.
_IGNORED = re.compile(r"blk\.\d+\.attn_rot_embd(\.weight)?")
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True)
class WeightSpec:
    """One weight of the graph: its GGUF name, its shape (outermost first) and its role."""

    name: str
    shape: tuple[int, ...]
    role: Role


@dataclass(frozen=True)
class _Problem:
    name: str
    text: str  # continues the name


def declare(config: ModelConfig) -> list[WeightSpec]:
    """All weights that the graph of ``config`` reads, in the order of computation."""
    embedding = (config.n_vocab, config.d_model)
    specs = [WeightSpec("token_embd.weight", embedding, "embedding")]
    for layer in range(config.n_layer):
        specs += (replace(spec, name=f"blk.{layer}.{spec.name}") for spec in _layer(config, layer))
    specs.append(WeightSpec("output_norm.weight", (config.d_model,), "norm"))
    if not config.tied_embeddings:
        specs.append(WeightSpec("output.weight", embedding, "linear"))
    return specs


def check(config: ModelConfig, file: GGUFFile) -> dict[str, TensorInfo]:
    """Find every declared weight in ``file``.

    Returns:
        Tensor infos by declared name. Shapes are the declared ones, also where a file stores the
        heads of k_b or v_b as further rows of a matrix.

    Raises:
        ModelError: one message with all missing weights, wrong shapes, wrong formats, and tensors
            that would change the computation but are not part of it.
    """
    specs = declare(config)
    found: dict[str, TensorInfo] = {}
    missing: list[WeightSpec] = []
    problems: list[_Problem] = []
    for spec in specs:
        info = file.tensors.get(spec.name)
        if info is None:
            missing.append(spec)
            continue
        problems += _problems(spec, info)
        found[spec.name] = replace(info, shape=spec.shape)
    problems += _unexpected(config, specs, file.tensors)
    if missing or problems:
        raise ModelError(_message(file, missing, problems))
    return found


def _layer(config: ModelConfig, layer: int) -> Iterator[WeightSpec]:
    """Weights of one layer, named without its prefix."""
    d = config.d_model
    yield WeightSpec("attn_norm.weight", (d,), "norm")
    yield from _attention(config)
    yield WeightSpec("ffn_norm.weight", (d,), "norm")
    if layer < config.n_layer_dense:
        yield from _swiglu("", config.d_ff, d)
    else:
        yield from _experts(config)


def _attention(config: ModelConfig) -> Iterator[WeightSpec]:
    d, n_head, latent = config.d_model, config.n_head, config.kv_lora_rank
    nope, value, rank = config.d_nope, config.d_value, config.q_lora_rank
    if rank is None:
        yield WeightSpec("attn_q.weight", (n_head * config.d_key, d), "linear")
    else:
        yield WeightSpec("attn_q_a.weight", (rank, d), "linear")
        yield WeightSpec("attn_q_a_norm.weight", (rank,), "norm")
        yield WeightSpec("attn_q_b.weight", (n_head * config.d_key, rank), "linear")
    yield WeightSpec("attn_kv_a_mqa.weight", (config.d_cache, d), "linear")
    yield WeightSpec("attn_kv_a_norm.weight", (latent,), "norm")
    if config.layout == "split":
        yield WeightSpec("attn_k_b.weight", (n_head, latent, nope), "k_b")
        yield WeightSpec("attn_v_b.weight", (n_head, value, latent), "v_b")
    else:
        yield WeightSpec("attn_kv_b.weight", (n_head * (nope + value), latent), "kv_b")
    yield WeightSpec("attn_output.weight", (d, n_head * value), "linear")


def _swiglu(suffix: str, width: int, d_model: int) -> Iterator[WeightSpec]:
    yield WeightSpec(f"ffn_gate{suffix}.weight", (width, d_model), "linear")
    yield WeightSpec(f"ffn_up{suffix}.weight", (width, d_model), "linear")
    yield WeightSpec(f"ffn_down{suffix}.weight", (d_model, width), "linear")


def _experts(config: ModelConfig) -> Iterator[WeightSpec]:
    moe, d = config.moe, config.d_model
    assert moe is not None, "layers after the dense ones have experts"
    yield WeightSpec("ffn_gate_inp.weight", (moe.n_expert, d), "router")
    if moe.has_bias:
        yield WeightSpec("exp_probs_b.bias", (moe.n_expert,), "router_bias")
    yield WeightSpec("ffn_gate_exps.weight", (moe.n_expert, moe.d_ff, d), "experts")
    yield WeightSpec("ffn_up_exps.weight", (moe.n_expert, moe.d_ff, d), "experts")
    yield WeightSpec("ffn_down_exps.weight", (moe.n_expert, d, moe.d_ff), "experts")
    if moe.n_expert_shared:
        yield from _swiglu("_shexp", moe.n_expert_shared * moe.d_ff, d)


def _problems(spec: WeightSpec, info: TensorInfo) -> Iterator[_Problem]:
    if not _same_data(spec, info):
        text = f"has shape {list(info.shape)}; accepted: {list(spec.shape)}"
        yield _Problem(spec.name, text)
    if info.format == _INTEGER_FORMAT:
        yield _Problem(spec.name, "is I32; accepted: floating-point and quantized formats")
    elif spec.role in _PLAIN_ROLES and info.format not in _PLAIN_FORMATS:
        yield _Problem(spec.name, f"is {info.format}; accepted: {', '.join(_PLAIN_FORMATS)}")


def _same_data(spec: WeightSpec, info: TensorInfo) -> bool:
    """Equal shapes, or (early split files) heads and rows of k_b and v_b in one dimension."""
    if info.shape == spec.shape:
        return True
    flat = (math.prod(spec.shape[:-1]), spec.shape[-1])
    return spec.role in ("k_b", "v_b") and info.shape == flat


def _unexpected(
    config: ModelConfig, specs: list[WeightSpec], tensors: Mapping[str, TensorInfo]
) -> Iterator[_Problem]:
    """Tensors that are no part of the graph, except those known to change nothing."""
    declared = {spec.name for spec in specs}
    for name in tensors:
        if name in declared or _IGNORED.fullmatch(name):
            continue
        match = _LAYER.fullmatch(name)
        if match is not None and int(match[1]) >= config.n_layer:
            if int(match[1]) < config.n_layer + config.n_layer_nextn:
                continue
            text = f"is in a layer beyond the {config.n_layer} that the metadata counts"
            yield _Problem(name, text)
        elif match is not None and match[2] == "attn_kv_b.weight":
            continue  # a file with both layouts: the split one is used
        else:
            yield _Problem(name, "is not implemented and may change the computation")


def _message(file: GGUFFile, missing: list[WeightSpec], problems: list[_Problem]) -> str:
    lines = [f"{file.paths[0]}: the tensors do not fit the model:"]
    if missing:
        names = _fold([_Problem(spec.name, str(list(spec.shape))) for spec in missing])
        lines.append(f"missing {len(missing)}: {', '.join(names)}")
    return "\n  ".join(lines + _fold(problems))


def _fold(problems: list[_Problem]) -> list[str]:
    """One text per problem; of a long list, one per kind of weight, with its layers."""
    if len(problems) <= _LISTED:
        return [f"{problem.name} {problem.text}" for problem in problems]
    layers: dict[tuple[str, str], list[int]] = {}
    for problem in problems:
        match = _LAYER.fullmatch(problem.name)
        name = match[2] if match else problem.name
        layers.setdefault((name, problem.text), []).extend([int(match[1])] if match else [])
    return [
        f"blk.{{{_ranges(of)}}}.{name} {text}" if of else f"{name} {text}"
        for (name, text), of in layers.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as ranges: "0-3,7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
