"""Conversion: rates in and out, beside the disk's, and peak memory.

python -m bench convert [--types bf16,q8_0,q4_k_m] [--sources fp8,bf16] [--mb 1000] [--keep DIR]

A random checkpoint is written first, of matrices as wide as the large models have them. Every
conversion runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_D, _FF, _HEADS, _LATENT, _RANK, _VOCAB = 4096, 1536, 32, 512, 1536, 1024
_DTYPES = {"fp8": ("F8_E4M3", 1), "bf16": ("BF16", 2)}
_CHUNK_BYTES = 16 << 20

_CONVERT = """
import json, resource, sys, time
from mla_backend.convert.from_hf import ConvertOptions, convert
started = time.perf_counter()
plan = convert(sys.argv[1], sys.argv[2], ConvertOptions(outtype=sys.argv[3]))
seconds = time.perf_counter() - started
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime,
    "in": plan.source_bytes, "out": plan.output.n_bytes, "threads": plan.n_threads,
    "peak": usage.ru_maxrss * 1024,
}))
"""


def main() -> None:
    """Measure and print one line per conversion."""
    parser = argparse.ArgumentParser(prog="bench convert")
    parser.add_argument("--types", default="bf16,q8_0,q4_k_m")
    parser.add_argument("--sources", default="fp8,bf16")
    parser.add_argument("--mb", type=int, default=1000, help="size of the checkpoint")
    parser.add_argument("--keep", type=Path, help="directory for the checkpoints, kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.keep or Path(scratch)
        print(f"disk: {_disk_rates(directory)}")
        for source in options.sources.split(","):
            checkpoint = directory / source
            if not (checkpoint / "config.json").exists():
                write_checkpoint(checkpoint, source, options.mb * 1_000_000)
            for type in options.types.split(","):
                print(measure(checkpoint, type), flush=True)


def measure(checkpoint: Path, type: str) -> str:
    """One conversion in a process of its own, in words."""
    out = checkpoint.with_suffix(".gguf")
    command = [sys.executable, "-c", _CONVERT, str(checkpoint), str(out), type]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    out.unlink()
    found = json.loads(text)
    seconds = found["seconds"]
    return (
        f"{checkpoint.name} -> {type}: {found['in'] / seconds / 1e6:.0f} MB/s in, "
        f"{found['out'] / seconds / 1e6:.0f} MB/s out, {seconds:.1f} s on {found['threads']} "
        f"threads ({found['cpu_seconds']:.1f} s of CPU), peak {found['peak'] / 1e6:.0f} MB"
    )


def _disk_rates(directory: Path) -> str:
    """What the disk writes and, from the page cache, gives back."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "disk.tmp"
    block = np.random.default_rng(0).bytes(_CHUNK_BYTES)
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(32):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    written = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(_CHUNK_BYTES):
            pass
    read = time.perf_counter()
    path.unlink()
    n_bytes = 32 * _CHUNK_BYTES
    return (
        f"{n_bytes / (written - started) / 1e6:.0f} MB/s written, "
        f"{n_bytes / (read - written) / 1e6:.0f} MB/s read from the page cache"
    )


def write_checkpoint(path: Path, source: str, n_bytes: int) -> None:
    """A checkpoint of about ``n_bytes`` in the form of the hub, with numbers that mean nothing."""
    path.mkdir(parents=True)
    expert_bytes = 3 * _D * _FF * _DTYPES[source][1]
    n_expert = max(4, n_bytes // expert_bytes)
    (path / "config.json").write_text(json.dumps(_config(n_expert, source)))
    (path / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    dtype = _DTYPES[source][0]
    tensors = {name: (dtype, shape) for name, shape in _matrices(n_expert)}
    if source == "fp8":
        blocks = {
            f"{name}_scale_inv": ("F32", [-(-extent // 128) for extent in shape])
            for name, (_, shape) in tensors.items()
        }
        tensors |= blocks
    tensors |= {name: ("BF16", shape) for name, shape in _others(n_expert)}
    _write_tensors(path / "model.safetensors", tensors)


def _config(n_expert: int, source: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "hidden_size": _D,
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "kv_lora_rank": _LATENT,
        "q_lora_rank": _RANK,
        "intermediate_size": _FF,
        "moe_intermediate_size": _FF,
        "n_routed_experts": n_expert,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 1,
        "topk_group": 1,
        "vocab_size": _VOCAB,
        "max_position_embeddings": 4096,
    }
    if source == "fp8":
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
        }
    return config


def _matrices(n_expert: int) -> Iterator[tuple[str, list[int]]]:
    layer = "model.layers.0."
    attention = {
        "q_a_proj": [_RANK, _D],
        "q_b_proj": [_HEADS * 192, _RANK],
        "kv_a_proj_with_mqa": [_LATENT + 64, _D],
        "kv_b_proj": [_HEADS * 256, _LATENT],
        "o_proj": [_D, _HEADS * 128],
    }
    for name, shape in attention.items():
        yield f"{layer}self_attn.{name}.weight", shape
    for owner in ("shared_experts", *(f"experts.{i}" for i in range(n_expert))):
        yield f"{layer}mlp.{owner}.gate_proj.weight", [_FF, _D]
        yield f"{layer}mlp.{owner}.up_proj.weight", [_FF, _D]
        yield f"{layer}mlp.{owner}.down_proj.weight", [_D, _FF]


def _others(n_expert: int) -> Iterator[tuple[str, list[int]]]:
    layer = "model.layers.0."
    yield "model.embed_tokens.weight", [_VOCAB, _D]
    yield "lm_head.weight", [_VOCAB, _D]
    yield "model.norm.weight", [_D]
    yield f"{layer}input_layernorm.weight", [_D]
    yield f"{layer}post_attention_layernorm.weight", [_D]
    yield f"{layer}self_attn.q_a_layernorm.weight", [_RANK]
    yield f"{layer}self_attn.kv_a_layernorm.weight", [_LATENT]
    yield f"{layer}mlp.gate.weight", [n_expert, _D]
    yield f"{layer}mlp.gate.e_score_correction_bias", [n_expert]


def _tokenizer() -> dict[str, Any]:
    step = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    return {
        "pre_tokenizer": step,
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
    }


def _write_tensors(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    sizes = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        n_bytes = int(np.prod(shape)) * sizes[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + n_bytes]}
        end += n_bytes
    raw = json.dumps(header).encode()
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for dtype, shape in tensors.values():
            for rows in _pieces(shape):
                file.write(_numbers(random, dtype, rows))


def _pieces(shape: list[int]) -> Iterator[int]:
    """Counts of numbers that add up to a tensor."""
    left = int(np.prod(shape))
    while left:
        count = min(left, _CHUNK_BYTES)
        yield count
        left -= count


def _numbers(random: np.random.Generator, dtype: str, count: int) -> bytes:
    """Numbers of ordinary size; a code of fp8 stands for one, and all but two codes do."""
    values: npt.NDArray[Any]
    if dtype == "F8_E4M3":
        values = random.integers(0, 0x70, count, np.uint8)
        values |= random.integers(0, 2, count, np.uint8) << 7
    else:
        values = random.standard_normal(count, np.float32) * np.float32(0.02)
        values = np.abs(values) if dtype == "F32" else values.view(np.uint16)[1::2]
    return bytes(values.tobytes())


if __name__ == "__main__":
    main()
