"""Rotary frequencies against the published formula, written out anew in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mla_backend.config import ModelConfig, RopeConfig, config_from_gguf
from mla_backend.gguf import read_gguf
from mla_backend.models.rope import rope_frequencies, rope_mscale

from tests.gguf.build import build, changed, tiny_model


def reference(rope: RopeConfig) -> list[float]:
    """Pair by pair: how often it turns in the original context decides its share of slowing."""
    out = []

    def pair_at(turns: float) -> float:
        numerator = math.log(rope.original_context / (2 * math.pi * turns))
        return rope.n_dims / 2 * numerator / math.log(rope.freq_base)

    for pair in range(rope.n_dims // 2):
        frequency = 1.0 / rope.freq_base ** (2 * pair / rope.n_dims)
        if rope.scaling == "linear":
            frequency /= rope.factor
        elif rope.scaling == "yarn":
            first = max(0, math.floor(pair_at(rope.beta_fast)))
            last = min(rope.n_dims - 1, math.ceil(pair_at(rope.beta_slow)))
            share = (pair - first) / (last - first if last > first else 0.001)
            share = min(1.0, max(0.0, share))
            frequency = share * frequency / rope.factor + (1 - share) * frequency
        out.append(frequency)
    return out


def config(folder: Path, **keys: Any) -> ModelConfig:
    names = {f"rope.{key.replace('__', '.')}": item for key, item in keys.items()}
    path = folder / "model.gguf"
    path.write_bytes(build(changed(tiny_model(), names)))
    return config_from_gguf(read_gguf(path))


@pytest.mark.parametrize(
    "keys",
    [
        {"scaling__type": "none"},
        {"scaling__type": "linear"},
        {},
        {"scaling__factor": 40.0},
        {"scaling__factor": 40.0, "scaling__original_context_length": 4096},
        {"scaling__factor": 32.0, "freq_base": 50000.0, "scaling__yarn_beta_slow": 31.9},
        {"scaling__yarn_beta_fast": 8.0, "scaling__yarn_beta_slow": 2.0},
        {"scaling__original_context_length": 1},
    ],
)
@pytest.mark.parametrize("n_dims", [2, 4, 34, 64, 128])
def test_frequencies(tmp_path: Path, keys: dict[str, Any], n_dims: int) -> None:
    lengths = {"attention.key_length_mla": n_dims + 32}
    path = tmp_path / "model.gguf"
    names = {f"rope.{key.replace('__', '.')}": item for key, item in keys.items()}
    path.write_bytes(
        build(changed(tiny_model(), names | lengths | {"rope.dimension_count": n_dims}))
    )
    found = config_from_gguf(read_gguf(path))
    frequencies = rope_frequencies(found)
    assert frequencies.dtype == np.float32
    assert frequencies.shape == (n_dims // 2,)
    np.testing.assert_allclose(frequencies, reference(found.rope), rtol=1.2e-7)


def test_known_values(tmp_path: Path) -> None:
    """64 dims, base 10000, factor 40 over 4096: pairs 0-10 keep theirs, 23-31 are slowed."""
    keys = {
        "dimension_count": 64,
        "scaling__factor": 40.0,
        "scaling__original_context_length": 4096,
    }
    path = tmp_path / "model.gguf"
    names = {f"rope.{key.replace('__', '.')}": item for key, item in keys.items()}
    path.write_bytes(build(changed(tiny_model(), names | {"attention.key_length_mla": 96})))
    frequencies = rope_frequencies(config_from_gguf(read_gguf(path)))
    plain = 10000.0 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(frequencies[:11], plain[:11], rtol=1e-7)
    np.testing.assert_allclose(frequencies[23:], plain[23:] / 40, rtol=1e-7)
    assert np.all(np.diff(frequencies) < 0)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, 1.0),
        ({"scaling__yarn_log_multiplier": 0.0707}, 1.0),
        ({"scaling__yarn_log_multiplier": None}, 1 + 0.1 * math.log(4)),
        ({"scaling__yarn_log_multiplier": 0.0}, 1 + 0.1 * math.log(4)),
        ({"scaling__yarn_log_multiplier": None, "scaling__attn_factor": 1.25}, 1.25),
        ({"scaling__type": "linear", "scaling__yarn_log_multiplier": None}, 1.0),
        ({"scaling__type": "none"}, 1.0),
    ],
)
def test_mscale(tmp_path: Path, keys: dict[str, Any], expected: float) -> None:
    assert rope_mscale(config(tmp_path, **keys)) == pytest.approx(expected, rel=1e-12)
