"""The latent cache in the memory of a device does what it does in the host's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cuda.device import cuda_backend
from mla_backend import _core
from mla_backend.cache import CACHE_TYPES, LatentCache
from mla_backend.config import config_from_gguf
from mla_backend.gguf import read_gguf
from small_models import small_model

CPU = _core.CpuBackend(_core.ThreadPool(1))


@pytest.mark.parametrize("type", CACHE_TYPES)
@pytest.mark.parametrize("on_device", [(0, 1), (1,)])
@pytest.mark.parametrize("device", ["cuda"])
def test_moves_turns_and_copies(type: str, on_device: tuple[int, ...], device: str) -> None:
    backend = cuda_backend()
    config = replace(
        config_from_gguf(read_gguf(small_model("tiny-v2", "f32", n_layer=2))), kv_lora_rank=64
    )
    host = LatentCache(config, 700, type, backend=CPU)
    other = LatentCache(config, 700, type, backend=CPU, devices=dict.fromkeys(on_device, backend))
    n_cell_bytes = host.bytes_per_position // 2
    numbers = np.random.default_rng(0).integers(0, 60, (2, 200, n_cell_bytes), np.uint8)
    found = []
    for cache in (host, other):
        sequence = cache.add()
        cache.write(sequence, numbers)
        twin = cache.fork(sequence)
        cache.drop(sequence, 20, 90)
        cache.shift(sequence, 1000)
        cache.keep_last(sequence, 64)
        found.append((cache.read(sequence), cache.read(twin)))
    for ours, theirs in zip(found[1], found[0], strict=True):
        for layer in range(2):
            _same_cells(ours[layer], theirs[layer], type, config.d_rope)
    assert other.memory.n_host_bytes == host.memory.n_host_bytes * (2 - len(on_device)) // 2


def _same_cells(ours: np.ndarray, theirs: np.ndarray, type: str, d_rope: int) -> None:
    """Latents are the same bytes; turned keys may differ by a rounding."""
    rope_bytes = d_rope * (4 if type == "f32" else 2)
    np.testing.assert_array_equal(ours[:, :-rope_bytes], theirs[:, :-rope_bytes])
    keys = [np.ascontiguousarray(cells[:, -rope_bytes:]) for cells in (ours, theirs)]
    if type == "bf16":
        a, b = ((key.view(np.uint16).astype(np.uint32) << 16).view(np.float32) for key in keys)
    else:
        a, b = (key.view(np.float32 if type == "f32" else np.float16) for key in keys)
    np.testing.assert_allclose(a, b, rtol=1e-2 if type == "bf16" else 2e-3, atol=1e-6)
